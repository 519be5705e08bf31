// What a decoding step writes down, in one launch: the tokens drawn, how long the answers are now and which of them
// ended.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace pmc::cuda {
namespace {

constexpr int kThreads = 128;

// A thread per running row; no two rows write the same answer.
__global__ void __launch_bounds__(kThreads) append_token_kernel(AppendTokenArgs args) {
    const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (r >= args.rows) return;
    const int64_t token = args.token[r], slot = args.slot[r], step = args.length[slot];
    args.tokens[slot * args.width + step] = token;
    args.logprobs[slot * args.width + step] = args.logprob[r];
    args.logprob_sum[slot] += static_cast<double>(args.logprob[r]);
    args.length[slot] = step + 1;
    bool ended = false;
    for (int64_t i = 0; i < args.end_count; ++i) ended = ended || token == args.ends[i];
    if (ended) args.finished[slot] = 1;
    args.done[r] = ended || step + 1 >= args.limit[slot];
    ++args.position[r];
}

}  // namespace

void append_token(const AppendTokenArgs& args, const Queue& queue) {
    const CurrentDevice current(queue.device, "append_token");
    launch("append_token", append_token_kernel, {(args.rows + kThreads - 1) / kThreads, kThreads, 1, 0}, queue.stream,
           args);
}

}  // namespace pmc::cuda
