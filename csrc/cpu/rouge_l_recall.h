// Longest common subsequences of token ids, many pairs at once: the counting half of rouge_l_recall.
#pragma once

#include <cstdint>

namespace pmc {

// lcs_out[p] = length of the longest common subsequence of pair p's candidate and reference, where the tokens of text p
// are ids[offsets[p]] up to but not including ids[offsets[p + 1]]. Any id, negative ones too, and any length will do;
// offsets never fall. Time is O(candidate * reference / 64) a pair, memory O(tokens of the longest pair).
// Throws std::bad_alloc or std::length_error when that memory cannot be had.
void rouge_l_lcs(const int32_t* candidate_ids,      // [candidate_offsets[pairs]]
                 const int64_t* candidate_offsets,  // [pairs + 1]
                 const int32_t* reference_ids,      // [reference_offsets[pairs]]
                 const int64_t* reference_offsets,  // [pairs + 1]
                 int64_t pairs,
                 int64_t* lcs_out);  // [pairs]

}  // namespace pmc
