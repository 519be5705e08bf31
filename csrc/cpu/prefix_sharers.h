// Finds the rows of a step that share a prefix, once for all its layers.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace pmc {

class PrefixSharers {
  public:
    // In sets that are small enough to keep the threads busy; a row that has none to share with is a set by itself.
    void find(const int64_t* prefix_row, const int64_t* first, int64_t rows, int64_t prefix_length, int64_t heads,
              int64_t kv_heads, int threads);

    Sharers found() const;

  private:
    std::vector<int64_t> begin_, order_;
};

}  // namespace pmc
