#include "cpu/prefix_sharers.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace pmc {

namespace {

constexpr int64_t kFewestRows = 16;  // that are parted for the sake of other threads

}  // namespace

void PrefixSharers::find(const int64_t* prefix_row, const int64_t* first, int64_t rows, int64_t prefix_length,
                         int64_t heads, int64_t kv_heads, int threads) {
    const int64_t together = std::min(kHeadsAtOnce, heads / kv_heads);
    begin_.clear();
    if (!worth_sharing(rows * together, prefix_length)) return;
    const auto seen = [&](int64_t row) { return std::pair(prefix_row[row], first[row]); };
    order_.resize(static_cast<size_t>(rows));
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return seen(a) < seen(b); });
    const int64_t most = std::clamp<int64_t>(rows * kv_heads / (3 * threads), kFewestRows, kSharingRows);
    for (int64_t from = 0, to; from < rows; from = to) {
        for (to = from + 1; to < rows && seen(order_[to]) == seen(order_[from]);) ++to;
        const bool share = worth_sharing((to - from) * together, prefix_length - first[order_[from]]);
        const int64_t count = to - from, sets = share ? (count + most - 1) / most : count;
        for (int64_t i = 0; i < sets; ++i) begin_.push_back(from + count * i / sets);
    }
    begin_.push_back(rows);
}

Sharers PrefixSharers::found() const {
    return {begin_.data(), order_.data(), std::max<int64_t>(1, static_cast<int64_t>(begin_.size())) - 1};
}

}  // namespace pmc
