// From products to weights and to the gradients of scores, in a tile of 16 x 8 in either direction:
//
//   weight         = exp(score - logsumexp)
//   score gradient = weight * (weight gradient - delta),   delta = output * output gradient - logsumexp gradient
//
// after Dao 2023, "FlashAttention-2" (https://arxiv.org/abs/2307.08691), algorithm 2; with the softcap's slope, and a
// weight gradient of 0 where the weight was dropped.
#pragma once

#include "cuda/attention/dropout.cuh"
#include "cuda/attention/scores.cuh"
#include "cuda/attention/seen.cuh"

namespace lmopt {
namespace cuda {

struct QueryFacts {
  float origin;  // of exponents: the logsumexp, see exponent_above(); inf where nothing is seen, or no query is
  float delta;
};

LMOPT_DEVICE QueryFacts load_facts(
    const DeviceCall& call, const DeviceGradients& gradients, int64_t batch, int64_t head, int query) {
  if (query >= call.num_queries) return {kInfinity, 0};
  const int64_t row = call.row_of(batch, head, query);
  return {gradients.origins[row], gradients.deltas[row]};
}

// One step: a head of a batch entry, some queries and some keys.
template <class T, bool kRowsAreKeys>
struct ScoreGradients {
  const DeviceCall& call;
  int batch, head;
  bool is_mixed;  // whether some of the pairs are not seen
  int lane;

  // Whether products are all that counts: then turn_plainly() does, in a third of the instructions.
  LMOPT_DEVICE bool is_plain() const { return !is_mixed && call.dropout.threshold == 0 && !needs_scores(call); }

  // A query that does not exist has products of 0 and an origin of inf, which makes weights of 0.
  LMOPT_DEVICE void turn_plainly(Sums& products, Sums& weight_gradients, const QueryFacts (&facts)[2]) const {
    const float factor = exponent_scale(call);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const QueryFacts& of_query = facts[kRowsAreKeys ? i & 1 : i >> 1];
      products[i] = exp2_approximately(fmaf(products[i], factor, -of_query.origin));
      weight_gradients[i] = products[i] * (weight_gradients[i] - of_query.delta);
    }
  }

  // Turns products of query and key into weights, 0 where dropped and else still to be scaled, and products of value
  // and output gradient into gradients of scores, still to be multiplied by the scale of the products. `facts` are
  // those of the lane's two queries. Of products the gradient is that of scores times the softcap's slope, unless the
  // scores' own is asked for.
  LMOPT_DEVICE void turn(
      Sums& products, Sums& weight_gradients, int first_query, int first_key, const QueryFacts (&facts)[2],
      bool takes_slope = true) const {
    uint32_t words[4];
    const bool drops = call.dropout.threshold != 0;
    if (drops) draw_words(words, first_query, first_key);
    SeenKeys seen[2] = {};
    int64_t bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = min(query_of(first_query, i, i), call.num_queries - 1);
      bias[i] = offset_of_bias(call.bias, batch, head, query);
      if (is_mixed) seen[i] = keys_seen_by(call.visibility, batch, head, query);
    }
    const bool has_rules = needs_scores(call);
    const float factor = exponent_scale(call);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int side = kRowsAreKeys ? i & 1 : i >> 1;
      const int key = key_of(first_key, i >> 1, i & 1);
      float slope = 1, score = products[i];
      if (has_rules) score = apply_rules<T>(call, score, bias[side], key, &slope);
      const bool counts = facts[side].origin != kInfinity && (!is_mixed || seen[side].has(key));
      const float exponent = exponent_above(has_rules, score, factor, facts[side].origin);
      const float weight = counts ? exp2_approximately(exponent) : 0;
      const bool is_kept = !drops || words[i] >= call.dropout.threshold;
      const float kept_scale = !drops ? 1 : is_kept ? call.dropout.kept_scale : 0;
      const float gradient = weight * (weight_gradients[i] * kept_scale - facts[side].delta);
      products[i] = is_kept ? weight : 0;
      weight_gradients[i] = !counts ? 0 : takes_slope ? gradient * slope : gradient;
    }
  }

 private:
  // Of a lane's sum in the upper (0) or lower half of the tile, and in the left (0) or right one of two columns.
  LMOPT_DEVICE int query_of(int first_query, int half, int side) const {
    return first_query + (kRowsAreKeys ? column_of_sum(lane, side) : row_of_sum(lane, 2 * half));
  }
  LMOPT_DEVICE int key_of(int first_key, int half, int side) const {
    return first_key + (kRowsAreKeys ? row_of_sum(lane, 2 * half) : column_of_sum(lane, side));
  }

  LMOPT_DEVICE void draw_words(uint32_t (&words)[4], int first_query, int first_key) const {
    const uint64_t seed = read_seed(call.dropout);
    if constexpr (kRowsAreKeys) {
      draw_words_by_key(words, seed, batch, head, query_of(first_query, 0, 0), first_key, lane);
    } else {
      const int upper = query_of(first_query, 0, 0), lower = query_of(first_query, 1, 0);
      draw_words_by_query(words, seed, batch, head, upper, head, lower, first_key, lane);
    }
  }
};

}  // namespace cuda
}  // namespace lmopt
