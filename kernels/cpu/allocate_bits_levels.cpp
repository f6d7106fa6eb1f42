// The greedy part of allocate_bits: from few bits to many, links in order of priority.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <utility>

#include "allocate_bits.h"

// The loops over a row of links are compiled for wide registers too, and chosen at run time.
#if defined(__x86_64__) && defined(__linux__)
#define MMC_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define MMC_WIDE
#endif

namespace moe_comp {
namespace {

constexpr int kShareBits = 10;
constexpr int64_t kWhole = int64_t{1} << kShareBits;
constexpr int kMantissaBits = 7;
constexpr int kPriorities = 64 << kMantissaBits;

// Marks the links of a row that have `level` bits and could have one more; adds their rows to those
// of their receivers and returns their sum.
MMC_WIDE int64_t choose(const int64_t* __restrict rows, const uint8_t* __restrict bits,
                        int64_t ranks, int64_t level, int64_t left,
                        const int64_t* __restrict receivers_left, uint8_t* __restrict chosen,
                        int64_t* __restrict received) {
  int64_t sent = 0;
  for (int64_t d = 0; d < ranks; ++d) {
    const bool fits = (bits[d] == level) & (rows[d] <= left) & (rows[d] <= receivers_left[d]);
    const int64_t n = fits ? rows[d] : 0;
    chosen[d] = fits;
    received[d] += n;
    sent += n;
  }
  return sent;
}

// Raises the chosen links of a row to the receivers that can afford all of theirs, and unmarks
// them; returns their rows.
MMC_WIDE int64_t raise_free(const int64_t* __restrict rows, uint8_t* __restrict bits, int64_t ranks,
                            const uint8_t* __restrict free, uint8_t* __restrict chosen,
                            int64_t* __restrict receivers_left) {
  int64_t sent = 0;
  for (int64_t d = 0; d < ranks; ++d) {
    const uint8_t raised = chosen[d] & free[d];
    const int64_t n = raised ? rows[d] : 0;
    bits[d] += raised;
    chosen[d] ^= raised;
    receivers_left[d] -= n;
    sent += n;
  }
  return sent;
}

// Returns the square of the share of its rows that each node can raise.
std::vector<int64_t> squared_shares(const std::vector<int64_t>& rows,
                                    const std::vector<int64_t>& left) {
  std::vector<int64_t> squares(rows.size(), kWhole);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] <= left[i] || rows[i] == 0) continue;
    const int64_t share = (left[i] << kShareBits) / rows[i];
    squares[i] = share * share >> kShareBits;
  }
  return squares;
}

// A floating-point number made of integers: bit length, then mantissa.
uint64_t priority_of(int64_t weight) {
  if (weight == 0) return 0;
  const int zeros = __builtin_clzll(weight);
  const uint64_t mantissa = static_cast<uint64_t>(weight) << zeros << 1 >> (64 - kMantissaBits);
  return static_cast<uint64_t>(64 - zeros) << kMantissaBits | mantissa;
}

class Levels {
 public:
  explicit Levels(Allocation& a)
      : a_(a),
        stride_((a.ranks + 7) / 8 * 8),
        chosen_(a.ranks * stride_),
        links_(new uint64_t[a.ranks * a.ranks]),
        sorted_(new uint64_t[a.ranks * a.ranks]) {}

  void raise(int64_t level) {
    const Totals rows = choose_links(level);
    if (rows.all == 0) return;
    const auto sender_shares = squared_shares(rows.senders, a_.left.senders);
    const auto receiver_shares = squared_shares(rows.receivers, a_.left.receivers);
    // Links between two nodes that can raise all their rows need no order, unless all links
    // together are short of budget: most of the work, if loads are skewed.
    if (rows.all <= a_.left.all) raise_unopposed(sender_shares, receiver_shares);
    raise_in_order(sort(sender_shares, receiver_shares));
  }

 private:
  Totals choose_links(int64_t level) {
    const int64_t P = a_.ranks;
    Totals rows{std::vector<int64_t>(P), std::vector<int64_t>(P)};
    for (int64_t s = 0; s < P; ++s) {
      const int64_t left = std::min(a_.left.senders[s], a_.left.all);
      const uint8_t* bits = a_.bits + s * P;
      uint8_t* chosen = chosen_.data() + s * stride_;
      if (left <= 0 || !std::memchr(bits, static_cast<int>(level), P)) {
        std::memset(chosen, 0, P);
        continue;
      }
      rows.senders[s] = choose(a_.rows + s * P, bits, P, level, left, a_.left.receivers.data(),
                               chosen, rows.receivers.data());
      rows.all += rows.senders[s];
    }
    return rows;
  }

  void raise_unopposed(const std::vector<int64_t>& sender_shares,
                       const std::vector<int64_t>& receiver_shares) {
    const int64_t P = a_.ranks;
    std::vector<uint8_t> free(P);
    for (int64_t d = 0; d < P; ++d) free[d] = receiver_shares[d] == kWhole;
    for (int64_t s = 0; s < P; ++s) {
      if (sender_shares[s] != kWhole) continue;
      const int64_t sent = raise_free(a_.rows + s * P, a_.bits + s * P, P, free.data(),
                                      chosen_.data() + s * stride_, a_.left.receivers.data());
      a_.left.senders[s] -= sent;
      a_.left.all -= sent;
    }
  }

  // Writes the chosen links to sorted_, highest priority first, in the order of the matrix where it
  // is equal; returns their number. A link is its place in the order of priorities, s and d.
  int64_t sort(const std::vector<int64_t>& sender_shares,
               const std::vector<int64_t>& receiver_shares) {
    std::array<int32_t, kPriorities> starts{};
    uint64_t* links = links_.get();
    const int64_t* shares = receiver_shares.data();
    int64_t count = 0;
    for (int64_t s = 0; s < a_.ranks; ++s) {
      const uint8_t* chosen = chosen_.data() + s * stride_;
      const int64_t* rows = a_.rows + s * a_.ranks;
      const int64_t share = sender_shares[s];
      for (int64_t eight = 0; eight < stride_; eight += 8) {
        uint64_t marks;
        std::memcpy(&marks, chosen + eight, 8);
        for (; marks; marks &= marks - 1) {
          const int64_t d = eight + __builtin_ctzll(marks) / 8;
          const uint64_t place = kPriorities - 1 - priority_of(rows[d] * share * shares[d]);
          ++starts[place];
          links[count++] = place << 48 | static_cast<uint64_t>(s) << 24 | d;
        }
      }
    }
    int32_t before = 0;
    for (int32_t& start : starts) before += std::exchange(start, before);
    uint64_t* sorted = sorted_.get();
    for (int64_t i = 0; i < count; ++i) sorted[starts[links[i] >> 48]++] = links[i];
    return count;
  }

  void raise_in_order(int64_t count) {
    int64_t* senders_left = a_.left.senders.data();
    int64_t* receivers_left = a_.left.receivers.data();
    int64_t all_left = a_.left.all;
    const int64_t ranks = a_.ranks;
    const int64_t* rows = a_.rows;
    const uint64_t* sorted = sorted_.get();
    uint8_t* bits = a_.bits;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = sorted[i] >> 24 & 0xffffff, d = sorted[i] & 0xffffff;
      const int64_t n = rows[s * ranks + d];
      // Without a branch, which would be a coin toss.
      const bool fits = (n <= senders_left[s]) & (n <= receivers_left[d]) & (n <= all_left);
      const int64_t spent = fits ? n : 0;
      senders_left[s] -= spent;
      receivers_left[d] -= spent;
      all_left -= spent;
      bits[s * ranks + d] += fits;
    }
    a_.left.all = all_left;
  }

  Allocation& a_;
  int64_t stride_;
  std::vector<uint8_t> chosen_;  // [ranks, stride]
  std::unique_ptr<uint64_t[]> links_;
  std::unique_ptr<uint64_t[]> sorted_;
};

}  // namespace

void raise_levels(Allocation& a) {
  Levels levels(a);
  for (int64_t level = a.min_bits; level < a.max_bits; ++level) levels.raise(level);
}

}  // namespace moe_comp
