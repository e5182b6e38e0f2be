// Newton-Schulz steps by bfloat16 products.
//
//   X <- X / max(norm(X), eps)
//   X <- a X + P X,   P = b G + c G G,   G = X X^T            X is [m, n], m <= n
//
// 1. G, P and all that follows from them are symmetric and commute: half of each product is computed and mirrored.
// 2. Their diagonals are kept apart, in float32: they have the largest entries, so rounding them would make most of
//    the error.
// 3. For wide matrices two steps share one pass over X, since the second step's G follows from the first one's:
//      H = a1 G + P1 G,   G2 = a1 H + P1 H,   P2 = b2 G2 + c2 G2 G2,   R = a1 P2 + a2 P1 + P2 P1,   X <- a1 a2 X + R X
//    No more than two: a rounding error that makes a small eigenvalue of G negative grows by a^2 in each of them.
#include "cpu/newton_schulz.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/newton_schulz_panels.h"
#include "cpu/share_tasks.h"

namespace lmopt {
namespace avx512_bf16 {
namespace {

constexpr double kWideRatio = 1.25;  // from this n / m on, sharing a pass over X costs less

// A symmetric matrix: zeros on the diagonal of the panels, the diagonal beside them.
struct Symmetric {
  Panels panels;
  float* diagonal;
};

// Runs task(0, worker) to task(count - 1, worker), each once, in one thread or in several.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  template <class Task>
  void run(int64_t count, const Task& task) const {
    share_tasks(threads_, count, [&](int64_t worker, Tasks& tasks) {
      for (int64_t i; tasks.next(i);) task(i, worker);
    });
  }

 private:
  int64_t threads_;
};

// One matrix at a time: its workspace, and the steps in it.
class Iteration {
 public:
  // Size of the workspace if `threads` share a matrix.
  static int64_t bytes(const NewtonSchulzProblem& problem, int64_t threads) {
    return Iteration(problem, Team(1), nullptr, threads).used_;
  }

  Iteration(const NewtonSchulzProblem& problem, const Team& team, char* memory, int64_t threads)
      : problem_(problem), team_(team), memory_(memory) {
    m_ = round_up(std::min(problem.rows, problem.columns));
    n_ = round_up(std::max(problem.rows, problem.columns));
    is_tall_ = problem.rows > problem.columns;
    x_ = take_panels(m_, n_);
    transposed_ = take_panels(n_, m_);
    for (Symmetric* matrix : {&gram_, &polynomial_, &scratch_}) *matrix = {take_panels(m_, m_), take<float>(m_)};
    row_factor_ = take<float>(m_);
    column_factor_ = take<float>(m_);
    block_squares_ = take<double>(n_ / kPanel);
    blocks_ = take_panels(m_, threads * kTileVectors * kPanel);
  }

  void run(int64_t index) {
    const int64_t offset = index * problem_.rows * problem_.columns;
    switch (problem_.type) {
      case MatrixType::float32:
        load<MatrixType::float32>(static_cast<const float*>(problem_.matrices) + offset);
        break;
      case MatrixType::bfloat16:
        load<MatrixType::bfloat16>(static_cast<const uint16_t*>(problem_.matrices) + offset);
        break;
      case MatrixType::float16:
        load<MatrixType::float16>(static_cast<const uint16_t*>(problem_.matrices) + offset);
        break;
    }
    const float* coefficients = problem_.coefficients;
    const bool is_wide = n_ >= kWideRatio * m_;
    int64_t step = 0;
    while (step < problem_.steps) {
      const bool take_two = is_wide && step + 2 <= problem_.steps;
      if (take_two) {
        two_steps(coefficients + 3 * step);
      } else {
        one_step(coefficients + 3 * step);
      }
      step += take_two ? 2 : 1;
    }
    store(problem_.result + offset);
  }

 private:
  template <class T>
  T* take(int64_t count) {
    char* place = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(place);
  }

  Panels take_panels(int64_t rows, int64_t columns) { return {take<uint32_t>(rows / 2 * columns), rows / 2}; }

  void one_step(const float* coefficients) {
    const float a = coefficients[0], b = coefficients[1], c = coefficients[2];
    compute_gram();
    multiply(polynomial_, c, gram_, gram_, b, 0);
    apply(polynomial_, a);
  }

  void two_steps(const float* coefficients) {
    const float a1 = coefficients[0], b1 = coefficients[1], c1 = coefficients[2];
    const float a2 = coefficients[3], b2 = coefficients[4], c2 = coefficients[5];
    compute_gram();
    multiply(polynomial_, c1, gram_, gram_, b1, 0);
    multiply(scratch_, 1, polynomial_, gram_, a1, 0);   // H
    multiply(gram_, 1, polynomial_, scratch_, a1, 0);   // G2
    multiply(scratch_, c2, gram_, gram_, b2, 0);        // P2
    multiply(gram_, 1, scratch_, polynomial_, a2, a1);  // R
    apply(gram_, a1 * a2);
  }

  void compute_gram() {
    compute_symmetric({transposed_, transposed_, gram_.panels, 1, nullptr, nullptr, gram_.diagonal});
  }

  // target = scale * left right + right_factor * right + left_factor * left, for matrices that commute.
  void multiply(
      const Symmetric& target, float scale, const Symmetric& left, const Symmetric& right, float right_factor,
      float left_factor) {
    for (int64_t i = 0; i < m_; ++i) {
      row_factor_[i] = scale * left.diagonal[i] + right_factor;
      column_factor_[i] = scale * right.diagonal[i] + left_factor;
    }
    compute_symmetric(
        {left.panels, right.panels, target.panels, scale, row_factor_, column_factor_, target.diagonal});
    for (int64_t i = 0; i < m_; ++i) {
      target.diagonal[i] += row_factor_[i] * right.diagonal[i] + left_factor * left.diagonal[i];
    }
  }

  // Computes the upper half in blocks of panels, the longest first, and mirrors it.
  void compute_symmetric(const Product& product) {
    const int64_t panels = m_ / kPanel, blocks = blocks_of_panels(m_);
    team_.run(blocks, [&](int64_t task, int64_t) {
      const int64_t begin = (blocks - 1 - task) * kTileVectors, end = std::min(begin + kTileVectors, panels);
      for (int64_t row = 0; row < end * kPanel; row += kTileRows) {
        compute_tile(product, row, std::max(begin, row / kPanel), end);
      }
      const Panels& target = product.target;
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t other = 0; other < panel; ++other) {
          transpose_block(target.at(other * kPanel / 2, panel), target.at(panel * kPanel / 2, other));
        }
      }
    });
  }

  // X <- factor X + matrix X, and its transpose.
  void apply(const Symmetric& matrix, float factor) {
    for (int64_t i = 0; i < m_; ++i) row_factor_[i] = matrix.diagonal[i] + factor;
    const int64_t panels = n_ / kPanel;
    team_.run(blocks_of_panels(n_), [&](int64_t task, int64_t worker) {
      const int64_t begin = task * kTileVectors, count = std::min<int64_t>(kTileVectors, panels - begin);
      const Panels source{x_.at(0, begin), m_ / 2}, target{blocks_.at(0, worker * kTileVectors), m_ / 2};
      const Product product{matrix.panels, source, target, 1, row_factor_, nullptr, nullptr};
      for (int64_t row = 0; row < m_; row += kTileRows) compute_tile(product, row, 0, count);
      std::memcpy(source.words, target.words, count * m_ / 2 * kPanel * sizeof(uint32_t));
      for (int64_t panel = begin; panel < begin + count; ++panel) {
        for (int64_t block = 0; block < m_ / kPanel; ++block) {
          transpose_block(x_.at(block * kPanel / 2, panel), transposed_.at(panel * kPanel / 2, block));
        }
      }
    });
  }

  // Divides the input by its norm, and packs it and its transpose. A task is a block of 16 rows.
  template <MatrixType kType>
  void load(const void* matrix) {
    const Panels &target = is_tall_ ? transposed_ : x_, &mirrored = is_tall_ ? x_ : transposed_;
    const int64_t row_blocks = round_up(problem_.rows) / kPanel, panels = round_up(problem_.columns) / kPanel;
    team_.run(row_blocks, [&](int64_t block, int64_t) {
      __m512d squares = _mm512_setzero_pd();
      for (int64_t row = block * kPanel; row < (block + 1) * kPanel; ++row) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          squares = add_squares(load_row<kType>(matrix, row, panel), squares);
        }
      }
      block_squares_[block] = _mm512_reduce_add_pd(squares);
    });
    double squares = 0;  // of large gradients, float32 would overflow
    for (int64_t block = 0; block < row_blocks; ++block) squares += block_squares_[block];
    const double norm = std::sqrt(squares), divisor = norm < problem_.eps ? problem_.eps : norm;
    const __m512 inverse = _mm512_set1_ps(static_cast<float>(1 / divisor));
    const auto load_scaled = [&](int64_t row, int64_t panel) {
      return _mm512_mul_ps(load_row<kType>(matrix, row, panel), inverse);
    };
    team_.run(row_blocks, [&](int64_t block, int64_t) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t row = block * kPanel; row < (block + 1) * kPanel; row += 2) {
          _mm512_storeu_si512(
              target.at(row / 2, panel), pack_rows(load_scaled(row, panel), load_scaled(row + 1, panel)));
        }
        transpose_block(target.at(block * kPanel / 2, panel), mirrored.at(panel * kPanel / 2, block));
      }
    });
  }

  static __m512d add_squares(__m512 row, __m512d squares) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(row));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(row, 1));
    return _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, squares));
  }

  // The elements of a row in a panel, as float32; zeros outside the matrix.
  template <MatrixType kType>
  __m512 load_row(const void* matrix, int64_t row, int64_t panel) const {
    const __mmask16 mask = mask_of(row, panel);
    const int64_t offset = row * problem_.columns + panel * kPanel;
    if constexpr (kType == MatrixType::float32) {
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(matrix) + offset);
    } else {
      const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(matrix) + offset);
      if constexpr (kType == MatrixType::float16) return _mm512_cvtph_ps(halves);
      return first_rows(_mm512_cvtepu16_epi32(halves));
    }
  }

  __mmask16 mask_of(int64_t row, int64_t panel) const {
    const int64_t columns = row < problem_.rows ? std::min(kPanel, problem_.columns - panel * kPanel) : 0;
    return static_cast<__mmask16>((1u << columns) - 1);
  }

  void store(uint16_t* result) {
    const Panels& source = is_tall_ ? transposed_ : x_;
    team_.run(round_up(problem_.rows) / kPanel, [&](int64_t block, int64_t) {
      for (int64_t row = block * kPanel; row < (block + 1) * kPanel; row += 2) {
        for (int64_t panel = 0; panel < round_up(problem_.columns) / kPanel; ++panel) {
          const __m512i words = _mm512_loadu_si512(source.at(row / 2, panel));
          uint16_t* place = result + row * problem_.columns + panel * kPanel;
          _mm256_mask_storeu_epi16(place, mask_of(row, panel), _mm512_cvtepi32_epi16(words));
          _mm256_mask_storeu_epi16(
              place + problem_.columns, mask_of(row + 1, panel), _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
        }
      }
    });
  }

  const NewtonSchulzProblem& problem_;
  const Team team_;
  char* memory_;
  int64_t used_ = 0;
  bool is_tall_;
  int64_t m_, n_;
  Panels x_, transposed_, blocks_;
  Symmetric gram_, polynomial_, scratch_;
  float *row_factor_, *column_factor_;
  double* block_squares_;
};

struct Memory {
  explicit Memory(int64_t bytes) : place(static_cast<char*>(std::aligned_alloc(64, bytes))) {}
  ~Memory() { std::free(place); }
  char* place;
};

}  // namespace

bool newton_schulz(const NewtonSchulzProblem& problem) {
  const int64_t threads = problem.threads, bytes = Iteration::bytes(problem, 1);
  const Memory memory(std::max(threads * bytes, Iteration::bytes(problem, threads)));
  if (memory.place == nullptr) return false;
  // Each thread takes whole matrices. The last few are shared by all threads, unless a matrix has work for no more
  // threads than there are matrices left.
  const int64_t shares = std::min(threads, blocks_of_panels(std::min(problem.rows, problem.columns)));
  const int64_t left = problem.batch % threads, whole = left < shares ? problem.batch - left : problem.batch;
  Team(threads).run(whole, [&](int64_t index, int64_t worker) {
    Iteration(problem, Team(1), memory.place + worker * bytes, 1).run(index);
  });
  for (int64_t index = whole; index < problem.batch; ++index) {
    Iteration(problem, Team(threads), memory.place, threads).run(index);
  }
  return true;
}

}  // namespace avx512_bf16
}  // namespace lmopt
