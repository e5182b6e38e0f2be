// Which weights dropout keeps: Philox4x32-10 by the place of the weight, as hf_lmopt/attention/philox.py defines it.
//
// One call has the words of four neighbouring keys of one query. The lanes that hold these in a tile of 16 x 8 make
// one call each, of different queries, and exchange words.
#pragma once

#include "cuda/attention/call.h"
#include "cuda/attention/primitives.cuh"

namespace lmopt {
namespace cuda {

LMOPT_DEVICE uint64_t read_seed(const Dropout& dropout) {
  return dropout.seed == nullptr ? dropout.seed_on_host : *dropout.seed;
}

LMOPT_DEVICE uint4 philox(uint4 counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(counter.x, 0xD2511F53u), low0 = counter.x * 0xD2511F53u;
    const uint32_t high1 = __umulhi(counter.z, 0xCD9E8D57u), low1 = counter.z * 0xCD9E8D57u;
    counter = make_uint4(high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

LMOPT_DEVICE uint32_t select(const uint4& words, int index) {
  const uint32_t low = index & 1 ? words.y : words.x, high = index & 1 ? words.w : words.z;
  return index & 2 ? high : low;
}

// The words of a lane's four sums in a tile whose rows are queries, `query` and `query + 8` in this lane, and whose
// columns are the keys from `key`, a multiple of 8, on. Lanes 2 t and 2 t + 1 share a call.
LMOPT_DEVICE void draw_words_by_query(
    uint32_t (&words)[4], uint64_t seed, uint32_t batch, uint32_t head0, uint32_t query0, uint32_t head1,
    uint32_t query1, uint32_t key, int lane) {
  const int is_odd = lane & 1;
  const uint32_t group_of_keys = key / 4 + ((lane & 3) >> 1);
  const uint4 drawn =
      philox(make_uint4(group_of_keys, is_odd ? query1 : query0, is_odd ? head1 : head0, batch), seed);
  // The even lane needs words 0 and 1 of both calls, the odd one words 2 and 3.
  const uint32_t got0 = __shfl_xor_sync(kAllLanes, is_odd ? drawn.x : drawn.z, 1);
  const uint32_t got1 = __shfl_xor_sync(kAllLanes, is_odd ? drawn.y : drawn.w, 1);
  words[0] = is_odd ? got0 : drawn.x;
  words[1] = is_odd ? got1 : drawn.y;
  words[2] = is_odd ? drawn.z : got0;
  words[3] = is_odd ? drawn.w : got1;
}

// The same in a tile whose rows are the keys from `key`, a multiple of 16, on, and whose columns are queries, `query`
// and the next in this lane. The four lanes that hold the same queries of neighbouring keys share four calls: of two
// queries, and of the keys in the upper and in the lower half.
LMOPT_DEVICE void draw_words_by_key(
    uint32_t (&words)[4], uint64_t seed, uint32_t batch, uint32_t head, uint32_t query, uint32_t key, int lane) {
  const int row = lane >> 2, mine = row & 3;
  const uint32_t group_of_keys = key / 4 + row / 4 + 2 * (mine >> 1);
  const uint4 drawn = philox(make_uint4(group_of_keys, query + (mine & 1), head, batch), seed);
  // Word `mine` of call c is that of sum c; one lane of the four has it.
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, select(drawn, mine ^ step), step << 2);
#pragma unroll
    for (int call = 0; call < 4; ++call) {
      if (call == (mine ^ step)) words[call] = got;
    }
  }
}

}  // namespace cuda
}  // namespace lmopt
