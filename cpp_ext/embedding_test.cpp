// The embedding without Python, for the sanitizers: many shapes on every instruction set against the definition in
// double. Outputs lie in buffers of exactly their size, so that a write past the end is caught.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "fused_embedding.h"
#include "kernels/rays.h"

using namespace factorportrait;

namespace {

struct Case {
  int dim, latents, camera, height, width, slots, frames, threads;
  bool shared;
};

struct AlignedDelete {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

double half_value(std::uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double magnitude =
      exponent ? std::ldexp(1024.0 + mantissa, exponent - 25) : std::ldexp(static_cast<double>(mantissa), -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Returns the largest error relative to the largest value, of float32 and float16 output.
std::pair<double, double> run(const Case& c, Isa isa, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const int channels = 3 * c.latents + c.camera, cells = 4, rows = c.height / 2, columns = c.width / 2;
  const double stride = 8;
  std::vector<float> weight(static_cast<std::size_t>(c.dim) * channels * cells), bias(c.dim);
  std::vector<float> pose(static_cast<std::size_t>(c.latents) * c.slots * c.height * c.width);
  for (float& w : weight) w = static_cast<float>(0.1 * normal(random));
  for (float& b : bias) b = static_cast<float>(normal(random));
  for (float& p : pose) p = static_cast<float>(normal(random));
  std::vector<double> intrinsics(9 * c.frames, 0.0), c2w(16 * c.frames, 0.0);
  for (int f = 0; f < c.frames; ++f) {
    const double size = stride * c.width, focal = size * (c.shared ? 2.0 : 1.0 + 0.1 * f), angle = 0.3 * f;
    const double k[9] = {focal, 0.5, 0.3 * size, 0, 1.1 * focal, 0.7 * size, 0, 0, 1};
    const double m[16] = {std::cos(angle),  0, std::sin(angle), 0.1 * f, 0, 1, 0, -0.2,
                          -std::sin(angle), 0, std::cos(angle), -1.0,    0, 0, 0, 1};
    std::copy(k, k + 9, intrinsics.begin() + 9 * f);
    std::copy(m, m + 16, c2w.begin() + 16 * f);
  }

  EmbeddingConfig config;
  config.dim = c.dim;
  config.num_channels = channels;
  config.reference = {0, c.latents};
  config.camera = {2 * c.latents, c.camera};
  config.pose = {2 * c.latents + c.camera, c.latents};
  config.latent_height = c.height;
  config.latent_width = c.width;
  config.stride = stride;
  config.num_threads = c.threads;
  const FusedEmbedding embedding(config, weight.data(), bias.data(), isa);
  const int tokens = embedding.tokens_per_frame() * c.slots;
  // On a 64-byte line, as streaming stores need it.
  const std::unique_ptr<float[], AlignedDelete> single(
      static_cast<float*>(::operator new[](sizeof(float) * tokens * c.dim, std::align_val_t{64})));
  const auto half = std::make_unique<std::uint16_t[]>(static_cast<std::size_t>(tokens) * c.dim);
  const CameraView camera{intrinsics.data(), c.frames, c2w.data(), c.frames};
  const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(c.height) * c.width;
  const LatentView latents{pose.data(), plane * c.slots, plane};
  embedding.embed_chunk(c.slots, camera, latents, {single.get(), false});
  embedding.embed_chunk(c.slots, camera, latents, {half.get(), true});
  embedding.embed_reference({pose.data(), plane * c.slots, 0},
                            {std::make_unique<float[]>(tokens * c.dim).get(), false});

  double largest = 0, error = 0, half_error = 0;
  for (int token = 0; token < tokens; ++token) {
    const int slot = token / (rows * columns), top = token / columns % rows * 2, left = token % columns * 2;
    std::vector<double> input(static_cast<std::size_t>(channels) * cells, 0.0);
    for (int cell = 0; cell < cells; ++cell) {
      const int y = top + cell / 2, x = left + cell % 2;
      for (int channel = 0; channel < c.latents; ++channel)
        input[(config.pose.start + channel) * cells + cell] =
            pose[(channel * c.slots + slot) * plane + y * c.width + x];
      const int count = c.camera / kRayChannels;
      for (int j = 0; j < count; ++j) {
        const int frame = group_frame(c.frames, c.slots, slot, count == 1 ? 3 : j);
        const double* m = &c2w[16 * frame];
        double inverse[9], local[3], ray[6];
        if (!invert3(&intrinsics[9 * frame], inverse)) std::abort();
        unit_direction(inverse, cell_centre(x, stride), cell_centre(y, stride), local);
        for (int i = 0; i < 3; ++i)
          ray[3 + i] = m[4 * i] * local[0] + m[4 * i + 1] * local[1] + m[4 * i + 2] * local[2];
        ray[0] = m[7] * ray[5] - m[11] * ray[4];
        ray[1] = m[11] * ray[3] - m[3] * ray[5];
        ray[2] = m[3] * ray[4] - m[7] * ray[3];
        for (int i = 0; i < 6; ++i) input[(config.camera.start + 6 * j + i) * cells + cell] = ray[i];
      }
    }
    for (int column = 0; column < c.dim; ++column) {
      double expected = bias[column];
      for (std::size_t k = 0; k < input.size(); ++k) expected += input[k] * weight[column * input.size() + k];
      const std::size_t index = static_cast<std::size_t>(token) * c.dim + column;
      largest = std::max(largest, std::abs(expected));
      error = std::max(error, std::abs(single[index] - expected));
      half_error = std::max(half_error, std::abs(half_value(half[index]) - expected));
    }
  }
  return {error / largest, half_error / largest};
}

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 6, 2, 2, 1, 1, 1, true},       {50, 3, 24, 5, 7, 2, 8, 2, false},    {48, 16, 24, 8, 16, 3, 12, 2, true},
      {49, 2, 6, 6, 21, 3, 9, 3, true},     {95, 4, 24, 9, 23, 2, 5, 1, false},   {130, 1, 0, 4, 6, 2, 8, 4, true},
      {64, 5, 24, 20, 22, 4, 13, 3, false}, {17, 16, 6, 12, 34, 5, 5, 16, false},
  };
  int failures = 0;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_supported(isa)) {
      std::printf("%s: not on this processor\n", isa_name(isa));
      continue;
    }
    double worst = 0, worst_half = 0;
    for (const Case& c : cases) {
      const auto [error, half_error] = run(c, isa, 7);
      worst = std::max(worst, error);
      worst_half = std::max(worst_half, half_error);
    }
    // An output large enough to be written past the caches, with a task count that does not divide evenly.
    const auto [error, half_error] = run({1536, 1, 6, 66, 64, 4, 4, 3, true}, isa, 8);
    worst = std::max(worst, error);
    worst_half = std::max(worst_half, half_error);
    const bool good = worst <= 1e-5 && worst_half <= 6e-4;
    failures += !good;
    std::printf("%s: error %.2g, float16 %.2g%s\n", isa_name(isa), worst, worst_half, good ? "" : ": FAILED");
  }

  EmbeddingConfig config;
  config.dim = 4;
  config.num_channels = 6;
  config.camera = {0, 6};
  config.latent_height = config.latent_width = 2;
  const std::vector<float> weight(4 * 6 * 4), bias(4);
  std::vector<float> out(4);
  const FusedEmbedding embedding(config, weight.data(), bias.data(), best_isa());
  double k[9] = {1, 0, 0, 0, 0, 0, 0, 0, 1}, m[16] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1};
  const auto embed = [&](int frames) { embedding.embed_chunk(1, {k, 1, m, frames}, {}, {out.data(), false}); };
  failures += !refuses([&] { embed(1); });
  k[4] = std::nan("");
  failures += !refuses([&] { embed(1); });
  k[4] = 1;
  failures += refuses([&] { embed(1); });
  failures += !refuses([&] { embed(2); });
  config.camera.count = 7;
  failures += !refuses([&] { FusedEmbedding(config, weight.data(), bias.data(), best_isa()); });
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
