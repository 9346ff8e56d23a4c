// The mathematics of the fused embedding that the C++ extension and the CUDA kernels share. No includes besides
// <cmath>: NVRTC has none.
//
// A camera-ray channel group is [o x d, d], with d the unit direction of the ray through the centre of a latent cell
// and o the camera's centre, both in head space. It is linear in d, and d = R * c with c the unit direction in the
// camera's own space, so
//
//     W_moment * (o x d) + W_direction * d  =  (W * F) * c,      F = [ [o]x R ; R ]   (6 x 3)
//
// Six channels of weights fold into three per frame, once per slot. Frames of one group that have the same intrinsics
// see the same c, so their folded weights add up: 24 channels per cell become 3.
#pragma once

#if defined(__CUDACC__)
#define FP_HOST_DEVICE __host__ __device__
#else
#include <cmath>
#define FP_HOST_DEVICE
#endif

namespace factorportrait {

constexpr int kRayChannels = 6;     // [o x d, d]
constexpr int kFramesPerGroup = 4;  // frames in a latent frame

// Position in pixels of the centre of latent cell `index` when a cell covers `stride` pixels. Pixel centres lie at
// +0.5.
FP_HOST_DEVICE inline double cell_centre(int index, double stride) { return (index + 0.5) * stride; }

// direction[3] = m * (u, v, 1), scaled to length one. m: [3][3], row-major.
FP_HOST_DEVICE inline void unit_direction(const double* m, double u, double v, double* direction) {
  const double x = m[0] * u + m[1] * v + m[2];
  const double y = m[3] * u + m[4] * v + m[5];
  const double z = m[6] * u + m[7] * v + m[8];
  const double scale = 1.0 / sqrt(x * x + y * y + z * z);
  direction[0] = x * scale;
  direction[1] = y * scale;
  direction[2] = z * scale;
}

// fold[6][3] = [ [origin]x * rotation ; rotation ], row-major.
FP_HOST_DEVICE inline void fold_matrix(const double* rotation, const double* origin, double* fold) {
  for (int j = 0; j < 3; ++j) {
    const double x = rotation[j], y = rotation[3 + j], z = rotation[6 + j];
    fold[j] = origin[1] * z - origin[2] * y;
    fold[3 + j] = origin[2] * x - origin[0] * z;
    fold[6 + j] = origin[0] * y - origin[1] * x;
    fold[9 + j] = x;
    fold[12 + j] = y;
    fold[15 + j] = z;
  }
}

// inverse[3][3] of m[3][3]. False when m is singular to working precision or holds a value that is not finite.
FP_HOST_DEVICE inline bool invert3(const double* m, double* inverse) {
  double cofactor[9];
  double largest = 0.0;
  for (int i = 0; i < 9; ++i) {
    const double magnitude = m[i] < 0 ? -m[i] : m[i];
    if (!(magnitude < 1e100)) return false;  // also catches NaN
    largest = magnitude > largest ? magnitude : largest;
  }
  cofactor[0] = m[4] * m[8] - m[5] * m[7];
  cofactor[1] = m[5] * m[6] - m[3] * m[8];
  cofactor[2] = m[3] * m[7] - m[4] * m[6];
  cofactor[3] = m[2] * m[7] - m[1] * m[8];
  cofactor[4] = m[0] * m[8] - m[2] * m[6];
  cofactor[5] = m[1] * m[6] - m[0] * m[7];
  cofactor[6] = m[1] * m[5] - m[2] * m[4];
  cofactor[7] = m[2] * m[3] - m[0] * m[5];
  cofactor[8] = m[0] * m[4] - m[1] * m[3];
  const double terms[3] = {m[0] * cofactor[0], m[1] * cofactor[1], m[2] * cofactor[2]};
  const double determinant = terms[0] + terms[1] + terms[2];
  const double size = largest * largest * largest;
  // An intrinsics matrix has entries from 1 to thousands, hence a bound relative to the cube of the largest that is far
  // below f * f / size.
  if (!((determinant < 0 ? -determinant : determinant) > 1e-14 * size) || size == 0.0) return false;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) inverse[3 * i + j] = cofactor[3 * j + i] / determinant;
  return true;
}

// Does rotation^T * rotation equal the identity, so that it keeps a unit vector's length?
FP_HOST_DEVICE inline bool is_orthonormal(const double* rotation, double tolerance) {
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      double dot = i == j ? -1.0 : 0.0;
      for (int k = 0; k < 3; ++k) dot += rotation[3 * k + i] * rotation[3 * k + j];
      if (!(dot < tolerance && dot > -tolerance)) return false;
    }
  return true;
}

// Which input frame is frame `j` of slot `slot`? With 4N frames each slot has its own four; with 4N-3 the first slot's
// only frame is repeated, as at the start of a clip; with N there is one per slot.
FP_HOST_DEVICE inline int group_frame(int num_frames, int num_slots, int slot, int j) {
  if (num_frames == kFramesPerGroup * num_slots) return kFramesPerGroup * slot + j;
  if (num_frames == kFramesPerGroup * num_slots - 3) return slot == 0 ? 0 : kFramesPerGroup * slot - 3 + j;
  return slot;
}

}  // namespace factorportrait
