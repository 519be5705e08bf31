// Bit-parallel LCS: Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
#include "cpu/rouge_l_recall.h"

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <utility>
#include <vector>

namespace pmc {
namespace {

constexpr int64_t kWordBits = 64;

struct Tokens {
    const int32_t* begin;
    int64_t size;
};

// Numbers the distinct ids of one text 0, 1, 2, ... in order of appearance.
class Numbering {
  public:
    static constexpr uint32_t kAbsent = UINT32_MAX;

    // Forgets everything and makes room for `size` ids at half load.
    void reset(int64_t size) {
        int bits = 4;
        while (bits < 62 && (int64_t{1} << bits) < 2 * size) ++bits;
        shift_ = 64 - bits;
        slots_.assign(size_t{1} << bits, Slot{0, kAbsent});
        count_ = 0;
    }

    uint32_t add(int32_t id) {
        Slot& slot = slots_[locate(id)];
        if (slot.number == kAbsent) slot = Slot{id, count_++};
        return slot.number;
    }

    uint32_t find(int32_t id) const { return slots_[locate(id)].number; }

    uint32_t count() const { return count_; }

  private:
    struct Slot {
        int32_t id;
        uint32_t number;
    };

    // The slot that holds the id, or the free one where it belongs.
    size_t locate(int32_t id) const {
        size_t at = (static_cast<uint32_t>(id) * uint64_t{0x9E3779B97F4A7C15}) >> shift_;
        while (slots_[at].number != kAbsent && slots_[at].id != id) at = (at + 1) & (slots_.size() - 1);
        return at;
    }

    std::vector<Slot> slots_;
    int shift_ = 60;
    uint32_t count_ = 0;
};

class LongestCommonSubsequence {
  public:
    int64_t length(Tokens pattern, Tokens text) {
        if (pattern.size > text.size) std::swap(pattern, text);
        if (pattern.size == 0) return 0;

        numbering_.reset(pattern.size);
        pattern_.clear();
        for (int64_t i = 0; i < pattern.size; ++i) pattern_.push_back(numbering_.add(pattern.begin[i]));
        text_.clear();
        for (int64_t i = 0; i < text.size; ++i) {
            const uint32_t number = numbering_.find(text.begin[i]);
            if (number != Numbering::kAbsent) text_.push_back(number);  // the others cannot match
        }

        // The table of the dynamic program is computed in strips of 64 pattern tokens, each over the whole text, so
        // that memory stays linear: what a strip needs of the one before is a carry for each text token.
        positions_.assign(numbering_.count(), 0);
        carry_.assign(text_.size(), 0);
        const int64_t size = static_cast<int64_t>(pattern_.size());
        int64_t total = 0;
        for (int64_t begin = 0; begin < size; begin += kWordBits) {
            const int64_t end = std::min(begin + kWordBits, size);
            for (int64_t i = begin; i < end; ++i) positions_[pattern_[i]] |= uint64_t{1} << (i - begin);
            total += strip();
            for (int64_t i = begin; i < end; ++i) positions_[pattern_[i]] = 0;
        }
        return total;
    }

  private:
    // Bit i of `level` is 0 where the LCS of pattern[: i + 1] and the text so far is one longer than that of
    // pattern[: i]; the zeros at the end are this strip's share of the length. Bits past the pattern stay 1.
    int64_t strip() {
        uint64_t level = ~uint64_t{0};
        for (size_t j = 0; j < text_.size(); ++j) {
            const uint64_t matches = level & positions_[text_[j]];
            const uint64_t partial = level + matches;
            const uint64_t sum = partial + carry_[j];
            carry_[j] = (partial < level) | (sum < partial);
            level = sum | (level - matches);
        }
        return static_cast<int64_t>(std::bitset<64>(~level).count());
    }

    Numbering numbering_;
    std::vector<uint32_t> pattern_, text_;  // numbers for ids; the text without the ids the pattern lacks
    std::vector<uint64_t> positions_;       // [distinct ids of the pattern]: where each stands in the strip
    std::vector<uint8_t> carry_;            // [text]: out of the strip before, replaced by that out of this one
};

}  // namespace

void rouge_l_lcs(const int32_t* candidate_ids, const int64_t* candidate_offsets, const int32_t* reference_ids,
                 const int64_t* reference_offsets, int64_t pairs, int64_t* lcs_out) {
    LongestCommonSubsequence lcs;
    for (int64_t p = 0; p < pairs; ++p) {
        const Tokens candidate{candidate_ids + candidate_offsets[p], candidate_offsets[p + 1] - candidate_offsets[p]};
        const Tokens reference{reference_ids + reference_offsets[p], reference_offsets[p + 1] - reference_offsets[p]};
        lcs_out[p] = lcs.length(candidate, reference);
    }
}

}  // namespace pmc
