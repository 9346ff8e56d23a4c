// target = sum of weight * source, term after term: the arithmetic of guidance and of a scheduler's step on the device.
// Compiled where it runs by NVRTC. Products are rounded before they are added, as NumPy does it, so that a device and
// the host agree to the bit.

namespace {

#if defined(__CUDA_ARCH__)
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float sum(float a, float b) { return __fadd_rn(a, b); }
#else
inline float product(float a, float b) { return a * b; }
inline float sum(float a, float b) { return a + b; }
#endif

}  // namespace

// sources: `count` addresses of `size` floats each, of which one may be the target; weights: as many numbers. Both tables
// lie on the device. Of every `period` floats the first `skipped` are left as they are.
extern "C" __global__ void weighted_sum(const float* const* sources, const float* weights, int count, float* target,
                                        long long size, long long period, long long skipped) {
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size || i % period < skipped) return;
  float value = product(sources[0][i], weights[0]);
  for (int term = 1; term < count; ++term) value = sum(value, product(sources[term][i], weights[term]));
  target[i] = value;
}
