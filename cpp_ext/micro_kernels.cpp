#include "micro_kernels.h"

#include <cstdint>
#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define FP_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define FP_X86 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define FP_INLINE inline __attribute__((always_inline))
#else
#define FP_INLINE inline
#endif

namespace factorportrait {
namespace {

// Round to nearest even, as the instructions do.
FP_INLINE std::uint16_t half_from_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u)
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));  // NaN keeps its payload
  if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);     // rounds to infinity
  if (bits < 0x38800000u) {                                                       // subnormal or zero
    if (bits < 0x33000000u) return static_cast<std::uint16_t>(sign);
    const std::uint32_t shift = 126u - (bits >> 23);
    const std::uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    const std::uint32_t whole = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
    return static_cast<std::uint16_t>(sign | (whole + (rest > middle || (rest == middle && (whole & 1u)))));
  }
  const std::uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Accumulates in double: the moment part of a fold cancels when a ray passes close to the origin, as rays of portrait
// cameras do.
template <int kColumns>
FP_INLINE void fold_panel(const float* weights, const double (*folds)[3], int cells, int channels, int num_rays,
                          float* folded) {
  const int channels_per_ray = channels / num_rays;
  for (int ray = 0; ray < num_rays; ++ray)
    for (int cell = 0; cell < cells; ++cell)
      for (int j = 0; j < 3; ++j) {
        double sum[kColumns] = {};
        for (int channel = ray * channels_per_ray; channel < (ray + 1) * channels_per_ray; ++channel) {
          const double factor = folds[channel][j];
          const float* row = weights + static_cast<std::ptrdiff_t>(cell * channels + channel) * kColumns;
          for (int column = 0; column < kColumns; ++column) sum[column] += factor * static_cast<double>(row[column]);
        }
        for (int column = 0; column < kColumns; ++column) *folded++ = static_cast<float>(sum[column]);
      }
}

// ---- portable: plain arrays of a size that compilers turn into vectors

constexpr int kPortableRows = 4;
constexpr int kPortableColumns = 8;

template <int kRows, bool kHalf>
void portable_kernel(const MicroArguments& a) {
  float sum[kRows][kPortableColumns];
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kPortableColumns; ++column) sum[row][column] = a.bias[column];
  const float* tile = a.tile;
  for (int piece = 0; piece < 2; ++piece) {
    const float* weights = piece ? a.second : a.first;
    const int depth = piece ? a.second_depth : a.first_depth;
    for (int k = 0; k < depth; ++k, tile += kPortableRows, weights += kPortableColumns)
      for (int row = 0; row < kRows; ++row)
        for (int column = 0; column < kPortableColumns; ++column) sum[row][column] += tile[row] * weights[column];
  }
  for (int row = 0; row < kRows; ++row) {
    if (kHalf) {
      auto* out = static_cast<std::uint16_t*>(a.out) + row * a.out_stride;
      for (int column = 0; column < a.num_columns; ++column) out[column] = half_from_float(sum[row][column]);
    } else {
      auto* out = static_cast<float*>(a.out) + row * a.out_stride;
      if (a.num_columns == kPortableColumns) {
        std::memcpy(out, sum[row], sizeof sum[row]);
      } else {
        std::memcpy(out, sum[row], static_cast<std::size_t>(a.num_columns) * sizeof(float));
      }
    }
  }
}

void portable_fold(const float* weights, const double (*folds)[3], int cells, int channels, int num_rays,
                   float* folded) {
  fold_panel<kPortableColumns>(weights, folds, cells, channels, num_rays, folded);
}

void no_fence() {}

#if FP_X86
#define FP_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FP_AVX512 __attribute__((target("avx512f,avx2,fma,f16c")))

void store_fence() { _mm_sfence(); }

enum class Store { kSingle, kStream, kHalf };

// ---- AVX2 + FMA: 6 x 16, twelve accumulators, two weights and one broadcast value in sixteen registers

constexpr int kAvx2Rows = 6;
constexpr int kAvx2Columns = 16;

template <int kRows, Store kStore>
FP_AVX2 void avx2_kernel(const MicroArguments& a) {
  __m256 sum[kRows][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = _mm256_load_ps(a.bias);
    sum[row][1] = _mm256_load_ps(a.bias + 8);
  }
  const float* tile = a.tile;
  for (int piece = 0; piece < 2; ++piece) {
    const float* weights = piece ? a.second : a.first;
    const int depth = piece ? a.second_depth : a.first_depth;
    for (int k = 0; k < depth; ++k, tile += kAvx2Rows, weights += kAvx2Columns) {
      const __m256 left = _mm256_load_ps(weights), right = _mm256_load_ps(weights + 8);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m256 value = _mm256_broadcast_ss(tile + row);
        sum[row][0] = _mm256_fmadd_ps(value, left, sum[row][0]);
        sum[row][1] = _mm256_fmadd_ps(value, right, sum[row][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if (kStore == Store::kHalf) {
      auto* out = static_cast<std::uint16_t*>(a.out) + row * a.out_stride;
      const __m128i left = _mm256_cvtps_ph(sum[row][0], _MM_FROUND_TO_NEAREST_INT);
      const __m128i right = _mm256_cvtps_ph(sum[row][1], _MM_FROUND_TO_NEAREST_INT);
      if (a.num_columns == kAvx2Columns) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), left);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), right);
      } else {
        alignas(32) std::uint16_t part[kAvx2Columns];
        _mm_store_si128(reinterpret_cast<__m128i*>(part), left);
        _mm_store_si128(reinterpret_cast<__m128i*>(part + 8), right);
        std::memcpy(out, part, static_cast<std::size_t>(a.num_columns) * sizeof part[0]);
      }
    } else {
      float* out = static_cast<float*>(a.out) + row * a.out_stride;
      if (kStore == Store::kStream) {
        _mm256_stream_ps(out, sum[row][0]);
        _mm256_stream_ps(out + 8, sum[row][1]);
      } else if (a.num_columns == kAvx2Columns) {
        _mm256_storeu_ps(out, sum[row][0]);
        _mm256_storeu_ps(out + 8, sum[row][1]);
      } else {
        alignas(32) float part[kAvx2Columns];
        _mm256_store_ps(part, sum[row][0]);
        _mm256_store_ps(part + 8, sum[row][1]);
        std::memcpy(out, part, static_cast<std::size_t>(a.num_columns) * sizeof part[0]);
      }
    }
  }
}

FP_AVX2 void avx2_fold(const float* weights, const double (*folds)[3], int cells, int channels, int num_rays,
                       float* folded) {
  fold_panel<kAvx2Columns>(weights, folds, cells, channels, num_rays, folded);
}

// ---- AVX-512F: 8 x 48, twenty-four accumulators, three weights and one broadcast value in thirty-two registers

constexpr int kAvx512Rows = 8;
constexpr int kAvx512Columns = 48;

template <int kRows, Store kStore>
FP_AVX512 void avx512_kernel(const MicroArguments& a) {
  __m512 sum[kRows][3];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = _mm512_load_ps(a.bias);
    sum[row][1] = _mm512_load_ps(a.bias + 16);
    sum[row][2] = _mm512_load_ps(a.bias + 32);
  }
  const float* tile = a.tile;
  for (int piece = 0; piece < 2; ++piece) {
    const float* weights = piece ? a.second : a.first;
    const int depth = piece ? a.second_depth : a.first_depth;
    for (int k = 0; k < depth; ++k, tile += kAvx512Rows, weights += kAvx512Columns) {
      const __m512 left = _mm512_load_ps(weights);
      const __m512 middle = _mm512_load_ps(weights + 16);
      const __m512 right = _mm512_load_ps(weights + 32);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m512 value = _mm512_set1_ps(tile[row]);
        sum[row][0] = _mm512_fmadd_ps(value, left, sum[row][0]);
        sum[row][1] = _mm512_fmadd_ps(value, middle, sum[row][1]);
        sum[row][2] = _mm512_fmadd_ps(value, right, sum[row][2]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if (kStore == Store::kHalf) {
      auto* out = static_cast<std::uint16_t*>(a.out) + row * a.out_stride;
      alignas(64) std::uint16_t part[kAvx512Columns];
      const bool whole = a.num_columns == kAvx512Columns;
      std::uint16_t* target = whole ? out : part;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i)
        // The form with a mask: GCC 12 warns of an uninitialised value inside of its header for the other one.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 16 * i),
                            _mm512_maskz_cvtps_ph(0xffff, sum[row][i], _MM_FROUND_TO_NEAREST_INT));
      if (!whole) std::memcpy(out, part, static_cast<std::size_t>(a.num_columns) * sizeof part[0]);
    } else {
      float* out = static_cast<float*>(a.out) + row * a.out_stride;
      if (kStore == Store::kStream) {
        _mm512_stream_ps(out, sum[row][0]);
        _mm512_stream_ps(out + 16, sum[row][1]);
        _mm512_stream_ps(out + 32, sum[row][2]);
      } else {
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          const int left = a.num_columns - 16 * i;
          const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
          _mm512_mask_storeu_ps(out + 16 * i, mask, sum[row][i]);
        }
      }
    }
  }
}

FP_AVX512 void avx512_fold(const float* weights, const double (*folds)[3], int cells, int channels, int num_rays,
                           float* folded) {
  fold_panel<kAvx512Columns>(weights, folds, cells, channels, num_rays, folded);
}
#endif  // FP_X86

}  // namespace

const KernelFamily& kernel_family(Isa isa) {
  static const KernelFamily portable = {
      kPortableRows,
      kPortableColumns,
      {nullptr, portable_kernel<1, false>, portable_kernel<2, false>, portable_kernel<3, false>,
       portable_kernel<4, false>},
      {},
      {nullptr, portable_kernel<1, true>, portable_kernel<2, true>, portable_kernel<3, true>, portable_kernel<4, true>},
      portable_fold,
      no_fence,
  };
#if FP_X86
#define FP_SIX(kernel, store) \
  {nullptr, kernel<1, store>, kernel<2, store>, kernel<3, store>, kernel<4, store>, kernel<5, store>, kernel<6, store>}
#define FP_EIGHT(kernel, store)                                                                        \
  {                                                                                                    \
    nullptr, kernel<1, store>, kernel<2, store>, kernel<3, store>, kernel<4, store>, kernel<5, store>, \
        kernel<6, store>, kernel<7, store>, kernel<8, store>                                           \
  }
  static const KernelFamily avx2 = {kAvx2Rows,
                                    kAvx2Columns,
                                    FP_SIX(avx2_kernel, Store::kSingle),
                                    FP_SIX(avx2_kernel, Store::kStream),
                                    FP_SIX(avx2_kernel, Store::kHalf),
                                    avx2_fold,
                                    store_fence};
  static const KernelFamily avx512 = {kAvx512Rows,
                                      kAvx512Columns,
                                      FP_EIGHT(avx512_kernel, Store::kSingle),
                                      FP_EIGHT(avx512_kernel, Store::kStream),
                                      FP_EIGHT(avx512_kernel, Store::kHalf),
                                      avx512_fold,
                                      store_fence};
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
#endif
  return portable;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable"; }

bool isa_supported(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if FP_X86
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool half = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!half || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  return isa == Isa::kAvx2 || __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

Isa best_isa() {
  if (isa_supported(Isa::kAvx512)) return Isa::kAvx512;
  return isa_supported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}

Isa parse_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (name != isa_name(isa)) continue;
    if (!isa_supported(isa)) throw std::invalid_argument("isa: this processor has no " + name + "; use isa=\"auto\"");
    return isa;
  }
  throw std::invalid_argument("isa: expected auto, portable, avx2 or avx512, got " + name);
}

}  // namespace factorportrait
