// Python's side of the fused embedding: checks arrays, releases the GIL, and passes pointers on.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "fused_embedding.h"

namespace py = pybind11;
using namespace factorportrait;

namespace {

std::string describe(const py::object& object) {
  if (!py::isinstance<py::array>(object)) return py::cast<std::string>(py::str(py::type::of(object).attr("__name__")));
  const auto array = py::cast<py::array>(object);
  return py::cast<std::string>(py::str(array.dtype())) + py::cast<std::string>(py::repr(array.attr("shape")));
}

[[noreturn]] void fail(const char* name, const std::string& expected, const py::object& found) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + describe(found));
}

// Negative sizes in `shape` match anything.
template <class T>
py::array require(const char* name, const py::object& object, const std::vector<py::ssize_t>& shape,
                  const char* expected, bool contiguous = true) {
  if (!py::isinstance<py::array>(object)) fail(name, expected, object);
  auto array = py::cast<py::array>(object);
  bool good = py::isinstance<py::array_t<T>>(array) && array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t i = 0; good && i < shape.size(); ++i) good = shape[i] < 0 || array.shape(i) == shape[i];
  if (!good) fail(name, expected, object);
  if (contiguous && !(array.flags() & py::array::c_style))
    fail(name, std::string(expected) + " that is C-contiguous", object);
  return array;
}

ChannelRange channel_range(const std::pair<int, int>& pair) { return {pair.first, pair.second}; }

class Embedding {
 public:
  Embedding(const py::object& weight, const py::object& bias, std::pair<int, int> reference, std::pair<int, int> camera,
            std::pair<int, int> pose, int latent_height, int latent_width, double stride, int num_threads,
            const std::string& isa)
      : core_(make(weight, bias, reference, camera, pose, latent_height, latent_width, stride, num_threads, isa)) {}

  void embed_reference(const py::object& latents, const py::object& out) const {
    const LatentView view = latents.is_none()
                                ? LatentView{}
                                : latent_view("reference_latents", latents, core_.config().reference.count, 1, false);
    const OutputView output = output_view(out, core_.tokens_per_frame());
    py::gil_scoped_release release;
    core_.embed_reference(view, output);
  }

  void embed_chunk(const py::object& intrinsics, const py::object& c2w, const py::object& pose, int num_slots,
                   const py::object& out) const {
    if (num_slots < 1) throw py::value_error("num_slots: expected at least 1, got " + std::to_string(num_slots));
    CameraView camera;
    if (intrinsics.is_none() != c2w.is_none()) throw py::value_error("K, c2w: expected both or neither");
    if (!intrinsics.is_none()) {
      const py::array k = require<double>("K", intrinsics, {-1, 3, 3}, "float64 (frames, 3, 3)");
      const py::array m = require<double>("c2w", c2w, {-1, 4, 4}, "float64 (frames, 4, 4)");
      camera.intrinsics = static_cast<const double*>(k.data());
      camera.num_intrinsics = static_cast<int>(k.shape(0));
      camera.c2w = static_cast<const double*>(m.data());
      camera.num_frames = static_cast<int>(m.shape(0));
    }
    const LatentView view =
        pose.is_none() ? LatentView{} : latent_view("pose_latents", pose, core_.config().pose.count, num_slots, true);
    const OutputView output = output_view(out, static_cast<py::ssize_t>(num_slots) * core_.tokens_per_frame());
    py::gil_scoped_release release;
    core_.embed_chunk(num_slots, camera, view, output);
  }

  const FusedEmbedding& core() const { return core_; }

 private:
  static FusedEmbedding make(const py::object& weight, const py::object& bias, std::pair<int, int> reference,
                             std::pair<int, int> camera, std::pair<int, int> pose, int latent_height, int latent_width,
                             double stride, int num_threads, const std::string& isa) {
    const py::array w =
        require<float>("weight", weight, {-1, -1, -1, -1}, "float32 (dim, channels, patch_height, patch_width)");
    const py::array b =
        require<float>("bias", bias, {w.shape(0)}, ("float32 (" + std::to_string(w.shape(0)) + ",)").c_str());
    EmbeddingConfig config;
    config.dim = static_cast<int>(w.shape(0));
    config.num_channels = static_cast<int>(w.shape(1));
    config.patch_height = static_cast<int>(w.shape(2));
    config.patch_width = static_cast<int>(w.shape(3));
    config.reference = channel_range(reference);
    config.camera = channel_range(camera);
    config.pose = channel_range(pose);
    config.latent_height = latent_height;
    config.latent_width = latent_width;
    config.stride = stride;
    config.num_threads = num_threads;
    return FusedEmbedding(config, static_cast<const float*>(w.data()), static_cast<const float*>(b.data()),
                          parse_isa(isa));
  }

  LatentView latent_view(const char* name, const py::object& object, int channels, int slots, bool has_slots) const {
    const int height = core_.config().latent_height, width = core_.config().latent_width;
    const std::string size = std::to_string(height) + ", " + std::to_string(width) + ")";
    const std::string head = "float32 (" + std::to_string(channels) + ", ";
    const std::string expected = has_slots ? head + std::to_string(slots) + ", " + size : head + size;
    std::vector<py::ssize_t> shape{channels, slots, height, width};
    if (!has_slots) shape.erase(shape.begin() + 1);
    const py::array array = require<float>(name, object, shape, expected.c_str(), false);
    const int rows = has_slots ? 2 : 1;
    const py::ssize_t item = sizeof(float);
    const bool dense =
        (width == 1 || array.strides(rows + 1) == item) && (height == 1 || array.strides(rows) == width * item);
    const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % sizeof(float) == 0 &&
                         array.strides(0) % item == 0 && (!has_slots || array.strides(1) % item == 0);
    if (!dense || !aligned) fail(name, expected + " with contiguous latent frames", object);
    return {static_cast<const float*>(array.data()), array.strides(0) / item, has_slots ? array.strides(1) / item : 0};
  }

  OutputView output_view(const py::object& object, py::ssize_t rows) const {
    const std::string expected =
        "float32 or float16 (" + std::to_string(rows) + ", " + std::to_string(core_.config().dim) + ")";
    if (!py::isinstance<py::array>(object)) fail("out", expected, object);
    auto array = py::cast<py::array>(object);
    const bool half = array.dtype().kind() == 'f' && array.dtype().itemsize() == 2 && array.dtype().byteorder() == '=';
    if (!half) require<float>("out", object, {rows, core_.config().dim}, expected.c_str());
    if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != core_.config().dim)
      fail("out", expected, object);
    if (!(array.flags() & py::array::c_style)) fail("out", expected + " that is C-contiguous", object);
    if (!array.writeable() || reinterpret_cast<std::uintptr_t>(array.data()) % (half ? 2 : 4) != 0)
      fail("out", expected + " that is writeable and aligned", object);
    return {array.mutable_data(), half};
  }

  FusedEmbedding core_;
};

}  // namespace

PYBIND11_MODULE(_embed, m) {
  m.doc() = "Condition tokens straight from cameras and latents. Use it through factorportrait.runtime.embedding.";
  m.def("supported_isas", [] {
    py::list names;
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
      if (isa_supported(isa)) names.append(isa_name(isa));
    return py::tuple(names);
  });
  py::class_<Embedding>(m, "FusedEmbedding")
      .def(py::init<const py::object&, const py::object&, std::pair<int, int>, std::pair<int, int>, std::pair<int, int>,
                    int, int, double, int, const std::string&>(),
           py::arg("weight"), py::arg("bias"), py::kw_only(), py::arg("reference"), py::arg("camera"), py::arg("pose"),
           py::arg("latent_height"), py::arg("latent_width"), py::arg("stride"), py::arg("num_threads") = 0,
           py::arg("isa") = "auto")
      .def("embed_reference", &Embedding::embed_reference, py::arg("latents"), py::kw_only(), py::arg("out"))
      .def("embed_chunk", &Embedding::embed_chunk, py::arg("K"), py::arg("c2w"), py::arg("pose_latents"), py::kw_only(),
           py::arg("num_slots"), py::arg("out"))
      .def_property_readonly("isa", [](const Embedding& self) { return isa_name(self.core().isa()); })
      .def_property_readonly("num_threads", [](const Embedding& self) { return self.core().num_threads(); })
      .def_property_readonly("tokens_per_frame", [](const Embedding& self) { return self.core().tokens_per_frame(); });
}
