// Runs a loop body over [0, count) on a number of threads.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pmc {

// Calls body(index, thread) for every index; thread < max_threads names the caller's slice of a workspace.
// The body must not throw.
template <class Body>
void parallel_for(int64_t count, int max_threads, const Body& body) {
#ifdef _OPENMP
    const int threads = static_cast<int>(count < max_threads ? count : max_threads);
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t index = 0; index < count; ++index) body(index, omp_get_thread_num());
        return;
    }
#endif
    (void)max_threads;
    for (int64_t index = 0; index < count; ++index) body(index, 0);
}

}  // namespace pmc
