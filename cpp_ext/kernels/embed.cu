// The fused embedding on a GPU, compiled where it runs by NVRTC (no headers but rays.h). The same three steps as the
// C++ extension: matrices per camera, weights folded per slot, and a product whose left side is made on the fly.
//
// Weights lie with the output columns innermost: latent_weight [channel, cell][dim], camera_weight [cell,
// channel][dim].
#include "rays.h"

using namespace factorportrait;

namespace {

constexpr int kTile = 64;   // tokens and columns of a block
constexpr int kDepth = 16;  // inputs that lie in shared memory at once
constexpr int kSide = 16;   // a block has kSide x kSide threads
constexpr int kMicro = kTile / kSide;

__device__ inline void store(float* out, float value) { *out = value; }

__device__ inline void store(unsigned short* out, float value) {
#if defined(__CUDA_ARCH__)
  // In place of cuda_fp16.h, which NVRTC has only where the toolkit's headers are installed.
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(*out) : "f"(value));
#else
  *out = half_from_float(value);
#endif
}

// One input of one token: a latent, or a coordinate of the direction of a ray.
__device__ inline float input_value(const float* latents, long long channel_stride, int latent_depth,
                                    const double* maps, int patch_height, int patch_width, int latent_width,
                                    double stride, int top, int left, int k) {
  const int cells = patch_height * patch_width;
  if (k < latent_depth) {
    const int channel = k / cells, cell = k % cells;
    const int y = top + cell / patch_width, x = left + cell % patch_width;
    return latents[channel * channel_stride + static_cast<long long>(y) * latent_width + x];
  }
  const int index = (k - latent_depth) / 3, ray = index / cells, cell = index % cells;
  double direction[3];
  unit_direction(maps + 9 * ray, cell_centre(left + cell % patch_width, stride),
                 cell_centre(top + cell / patch_width, stride), direction);
  return static_cast<float>(direction[(k - latent_depth) % 3]);
}

template <class Out>
__device__ inline void embed_tokens(const float* latents, long long channel_stride, long long slot_stride,
                                    int latent_channels, const float* latent_weight, const double* maps, int num_rays,
                                    const float* folded, const float* bias, int patch_height, int patch_width,
                                    int latent_width, int token_columns, int tokens_per_frame, int dim, double stride,
                                    Out* out) {
  __shared__ float left_tile[kDepth][kTile];
  __shared__ float right_tile[kDepth][kTile];
  const int slot = blockIdx.z, first_token = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  const int thread = threadIdx.y * kSide + threadIdx.x;
  const int cells = patch_height * patch_width;
  const int latent_depth = latent_channels * cells, camera_depth = 3 * cells * num_rays;
  const float* slot_folded = folded + static_cast<long long>(slot) * camera_depth * dim;
  float sum[kMicro][kMicro] = {};
  for (int start = 0; start < latent_depth + camera_depth; start += kDepth) {
    for (int i = thread; i < kDepth * kTile; i += kSide * kSide) {
      const int k = start + i / kTile, token = first_token + i % kTile, column = first_column + i % kTile;
      const bool inside = k < latent_depth + camera_depth;
      left_tile[i / kTile][i % kTile] =
          inside && token < tokens_per_frame
              ? input_value(latents + slot * slot_stride, channel_stride, latent_depth, maps + 9LL * num_rays * slot,
                            patch_height, patch_width, latent_width, stride, token / token_columns * patch_height,
                            token % token_columns * patch_width, k)
              : 0.0f;
      const float* weight = k < latent_depth ? latent_weight + static_cast<long long>(k) * dim
                                             : slot_folded + static_cast<long long>(k - latent_depth) * dim;
      right_tile[i / kTile][i % kTile] = inside && column < dim ? weight[column] : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < kMicro; ++i)
        for (int j = 0; j < kMicro; ++j)
          sum[i][j] += left_tile[k][threadIdx.y * kMicro + i] * right_tile[k][threadIdx.x + j * kSide];
    __syncthreads();
  }
  for (int i = 0; i < kMicro; ++i)
    for (int j = 0; j < kMicro; ++j) {
      const int token = first_token + threadIdx.y * kMicro + i, column = first_column + threadIdx.x + j * kSide;
      if (token < tokens_per_frame && column < dim)
        store(out + (static_cast<long long>(slot) * tokens_per_frame + token) * dim + column, sum[i][j] + bias[column]);
    }
}

}  // namespace

// One thread per used frame. frames_per_slot: 4, or 1 for the last frame of each group. num_rays: 1 when the frames of
// every group have the same intrinsics and rotations that keep lengths (the caller looks), else frames_per_slot. maps
// [num_slots][num_rays][3][3], folds [num_slots][frames_per_slot][6][3]; *num_bad counts cameras without rays.
extern "C" __global__ void embed_prepare_cameras(const double* intrinsics, int num_intrinsics, const double* c2w,
                                                 int num_frames, int num_slots, int frames_per_slot, int num_rays,
                                                 double* maps, double* folds, unsigned* num_bad) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= num_slots * frames_per_slot) return;
  const int slot = index / frames_per_slot, j = index % frames_per_slot;
  const int frame = group_frame(num_frames, num_slots, slot, frames_per_slot == 1 ? kFramesPerGroup - 1 : j);
  const bool shared = num_rays == 1 && frames_per_slot > 1;
  double rotation[9], origin[3], inverse[9], unused[9];
  for (int r = 0; r < 3; ++r) {
    for (int c = 0; c < 3; ++c) rotation[3 * r + c] = c2w[16 * frame + 4 * r + c];
    origin[r] = c2w[16 * frame + 4 * r + 3];
  }
  const bool good = invert3(intrinsics + (num_intrinsics == 1 ? 0 : 9 * frame), inverse) && invert3(rotation, unused);
  if (!good) {
    atomicAdd(num_bad, 1u);
    return;
  }
  double identity[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  fold_matrix(shared ? rotation : identity, origin, folds + 18LL * index);
  if (shared && j > 0) return;
  double* map = maps + 9LL * (slot * num_rays + j);
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < 3; ++c) {
      double value = 0;
      for (int i = 0; i < 3; ++i) value += rotation[3 * r + i] * inverse[3 * i + c];
      map[3 * r + c] = shared ? inverse[3 * r + c] : value;
    }
}

// One thread per column, blockIdx.y the slot. folded [num_slots][ray, cell, 3][dim].
extern "C" __global__ void embed_fold_cameras(const float* camera_weight, const double* folds, int cells, int channels,
                                              int num_rays, int dim, float* folded) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x, slot = blockIdx.y;
  if (column >= dim) return;
  const int channels_per_ray = channels / num_rays;
  const double* slot_folds = folds + 3LL * channels * slot;
  for (int ray = 0; ray < num_rays; ++ray)
    for (int cell = 0; cell < cells; ++cell)
      for (int j = 0; j < 3; ++j) {
        double sum = 0;
        for (int channel = ray * channels_per_ray; channel < (ray + 1) * channels_per_ray; ++channel)
          sum += slot_folds[3 * channel + j] *
                 static_cast<double>(camera_weight[(cell * channels + channel) * static_cast<long long>(dim) + column]);
        folded[(((static_cast<long long>(slot) * num_rays + ray) * cells + cell) * 3 + j) * dim + column] =
            static_cast<float>(sum);
      }
}

// Grid: columns / 64, tokens of a slot / 64, slots. Block: 16 x 16. latent_channels or num_rays is 0 for a dropped
// condition. latents [channels][slots][h][w] by their strides in elements, out [num_slots * tokens_per_frame][dim].
#define FP_EMBED_TOKENS(name, Out)                                                                                   \
  extern "C" __global__ void name(const float* latents, long long channel_stride, long long slot_stride,             \
                                  int latent_channels, const float* latent_weight, const double* maps, int num_rays, \
                                  const float* folded, const float* bias, int patch_height, int patch_width,         \
                                  int latent_width, int token_columns, int tokens_per_frame, int dim, double stride, \
                                  Out* out) {                                                                        \
    embed_tokens(latents, channel_stride, slot_stride, latent_channels, latent_weight, maps, num_rays, folded, bias, \
                 patch_height, patch_width, latent_width, token_columns, tokens_per_frame, dim, stride, out);        \
  }
FP_EMBED_TOKENS(embed_tokens_f32, float)
FP_EMBED_TOKENS(embed_tokens_f16, unsigned short)
