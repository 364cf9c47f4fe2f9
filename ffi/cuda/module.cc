// Python's face of the CUDA module. It loads where there is no driver; an endpoint needs one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include "cuda/endpoint.h"
#include "cuda/handlers.h"
#include "host/registry.h"

namespace py = pybind11;
using namespace jax_nixlep;
using cuda::CudaEndpoint;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename Function>
py::capsule Handler(Function* function) {
  return py::capsule(reinterpret_cast<void*>(function));
}

py::dict Address(const CudaEndpoint& endpoint) {
  py::dict address;
  address["pid"] = getpid();
  address["fd"] = -1;  // no peer maps it: all are reached through NIXL
  address["nonce"] = endpoint.nonce();
  address["base"] = reinterpret_cast<uintptr_t>(endpoint.region());
  return address;
}

py::dict Health(const CudaEndpoint& endpoint, int rank) {
  PeerHealth health;
  {
    py::gil_scoped_release unlocked;
    health = endpoint.Health(rank);
  }
  py::dict row;
  row["member"] = health.member;
  row["masked"] = health.masked;
  row["path"] = health.path;
  row["bytes_out"] = health.bytes_out;
  row["bytes_in"] = health.bytes_in;
  row["wait_s"] = double(health.wait_us) * 1e-6;
  row["timeouts"] = health.timeouts;
  return row;
}

std::shared_ptr<CudaEndpoint> MakeEndpoint(int device, int rank, int max_ranks, int experts_per_rank, int max_tokens,
                                           int top_k, int64_t row_bytes, double timeout_s, bool mask_late_peers) {
  Capacity capacity{max_ranks, experts_per_rank, max_tokens, top_k, int64_t(AlignUp(size_t(row_bytes)))};
  return std::make_shared<CudaEndpoint>(EndpointOptions{rank, capacity, timeout_s, mask_late_peers}, device);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "jax_nixlep on NVIDIA GPUs: endpoints of expert-parallel groups, and XLA FFI handlers";
  m.attr("XLA_FFI_API_VERSION") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("WIRE_VERSION") = kWireVersion;
  m.def("handlers", [] {
    return py::dict(
        py::arg("dispatch") = Handler(JaxNixlepDispatchCuda), py::arg("redispatch") = Handler(JaxNixlepRedispatchCuda),
        py::arg("combine") = Handler(JaxNixlepCombineCuda),
        py::arg("dispatch_start") = Handler(JaxNixlepDispatchStartCuda),
        py::arg("dispatch_finish") = Handler(JaxNixlepDispatchFinishCuda),
        py::arg("combine_start") = Handler(JaxNixlepCombineStartCuda),
        py::arg("combine_finish") = Handler(JaxNixlepCombineFinishCuda), py::arg("mark") = Handler(JaxNixlepMarkCuda));
  });
  m.def("num_launches", &cuda::NumLaunches, "Calls of handlers so far; replays of a command buffer make none.");
  m.def("elapsed_us", &cuda::ElapsedUs, py::arg("start"), py::arg("end"), "Time between two marks, for measurements.");
  m.def(
      "set_endpoint",
      [](int device, std::shared_ptr<CudaEndpoint> endpoint) {
        RegistryOf<CudaEndpoint>::Get().Set(device, std::move(endpoint));
      },
      py::arg("device"), py::arg("endpoint").none(true),
      "Operations of local device `device` use `endpoint` (or none).");

  // The exceptions are those of the CPU module, so that callers catch one kind.
  static py::object ep_error = py::module_::import("jax_nixlep._host").attr("EpError");
  static py::object nixl_error = py::module_::import("jax_nixlep._host").attr("NixlError");
  ep_error.inc_ref(), nixl_error.inc_ref();
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const EpError& error) {
      PyErr_SetString(ep_error.ptr(), error.what());
    } catch (const NixlError& error) {
      PyErr_SetString(nixl_error.ptr(), error.what());
    }
  });

  py::class_<CudaEndpoint, std::shared_ptr<CudaEndpoint>>(m, "Endpoint",
                                                          "A rank's end of a group; see ffi/cuda/endpoint.h.")
      .def(py::init(&MakeEndpoint), py::kw_only(), py::arg("device"), py::arg("rank"), py::arg("max_ranks"),
           py::arg("experts_per_rank"), py::arg("max_tokens"), py::arg("top_k"), py::arg("row_bytes"),
           py::arg("timeout_s"), py::arg("mask_late_peers"), Unlocked())
      .def("address", &Address, "Where the region is; for `connect_nixl` of the peers.")
      .def(
          "map_peer", [](CudaEndpoint&, int, int, int, uint64_t) { return false; }, py::arg("peer"), py::arg("pid"),
          py::arg("fd"), py::arg("nonce"), "False: peers are reached through NIXL, also those of the same machine.")
      .def(
          "open_nixl",
          [](CudaEndpoint& endpoint, const std::string& library, const std::string& name) {
            std::string metadata;
            {
              py::gil_scoped_release unlocked;
              metadata = endpoint.OpenNixl(library, name);
            }
            return py::bytes(metadata);
          },
          py::arg("library"), py::arg("name"))
      .def(
          "connect_nixl",
          // The nonce that keeps late writes of an earlier group apart on CPUs is not needed: views end with their
          // agent.
          [](CudaEndpoint& endpoint, int peer, const py::bytes& metadata, uint64_t remote_base, uint64_t /*nonce*/) {
            std::string blob = metadata;
            py::gil_scoped_release unlocked;
            endpoint.ConnectNixl(peer, blob, remote_base);
          },
          py::arg("peer"), py::arg("metadata"), py::arg("remote_base"), py::arg("nonce"))
      .def("drop_peer", &CudaEndpoint::DropPeer, py::arg("peer"), Unlocked())
      .def(
          "activate",
          [](CudaEndpoint& endpoint, int epoch, const std::vector<int>& members) {
            py::gil_scoped_release unlocked;
            endpoint.Activate(uint16_t(epoch), members);
          },
          py::arg("epoch"), py::arg("members"))
      .def("close", &CudaEndpoint::Close, Unlocked())
      .def("health", &Health, py::arg("rank"))
      .def("failure", &CudaEndpoint::Failure, "Why no operation can run any more; '' while all is well.")
      .def_property_readonly("num_bytes", [](const CudaEndpoint& e) { return e.num_bytes() + sizeof(cuda::Control); })
      .def_property_readonly("epoch", &CudaEndpoint::epoch)
      .def_property_readonly("num_operations", &CudaEndpoint::num_operations)
      .def_property_readonly("dropped_rows", &CudaEndpoint::dropped_rows)
      .def_property_readonly("invalid_ids", &CudaEndpoint::invalid_ids);
}
