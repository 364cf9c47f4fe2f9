// Python's face of the CUDA module. It loads where there is no driver; an endpoint needs one.
#include <unistd.h>

#include "binding.h"
#include "cuda/endpoint.h"
#include "cuda/handlers.h"
#include "cuda/nixl_ep.h"

using namespace jax_nixlep;
using cuda::CudaEndpoint;
using cuda::nixl_ep::NixlEpEndpoint;

namespace {

template <typename E>
py::dict Address(const E& endpoint) {
  py::dict address;
  address["pid"] = getpid();
  address["fd"] = -1;  // no peer maps anything, unless the caller says otherwise
  address["nonce"] = endpoint.nonce();
  address["base"] = reinterpret_cast<uintptr_t>(endpoint.region());
  return address;
}

std::shared_ptr<CudaEndpoint> MakeEndpoint(int device, int rank, int max_ranks, int experts_per_rank, int max_tokens,
                                           int top_k, int64_t row_bytes, double timeout_s, bool mask_late_peers) {
  Capacity capacity{max_ranks, experts_per_rank, max_tokens, top_k, int64_t(AlignUp(size_t(row_bytes)))};
  return std::make_shared<CudaEndpoint>(EndpointOptions{rank, capacity, timeout_s, mask_late_peers}, device);
}

std::shared_ptr<NixlEpEndpoint> MakeNixlEpEndpoint(const std::string& library, int device, int rank, int max_ranks,
                                                   int experts_per_rank, int max_tokens, int top_k, int hidden,
                                                   int num_hosts, double timeout_s, bool mask_late_peers) {
  const cuda::nixl_ep::Shape shape{max_ranks, experts_per_rank, max_tokens, top_k, hidden};
  return std::make_shared<NixlEpEndpoint>(NixlEpEndpoint::Options{rank, shape, num_hosts, timeout_s, mask_late_peers},
                                          device, library);
}

void BindNixlEp(py::module_& m) {
  py::class_<NixlEpEndpoint, std::shared_ptr<NixlEpEndpoint>> endpoint(
      m, "NixlEpEndpoint", "A rank's end of a group that uses NVIDIA's NIXL-EP kernels; see ffi/cuda/nixl_ep.h.");
  endpoint
      .def(py::init(&MakeNixlEpEndpoint), py::kw_only(), py::arg("library"), py::arg("device"), py::arg("rank"),
           py::arg("max_ranks"), py::arg("experts_per_rank"), py::arg("max_tokens"), py::arg("top_k"),
           py::arg("hidden"), py::arg("num_hosts"), py::arg("timeout_s"), py::arg("mask_late_peers"), Unlocked())
      .def("address", &Address<NixlEpEndpoint>)
      .def(
          "map_peer", [](NixlEpEndpoint&, int, int, int, uint64_t) { return false; }, py::arg("peer"), py::arg("pid"),
          py::arg("fd"), py::arg("nonce"))
      .def("agent_metadata", [](const NixlEpEndpoint& e) { return py::bytes(e.AgentMetadata()); })
      .def(
          "connect_upstream",
          [](NixlEpEndpoint& e, int peer, const py::bytes& metadata, double timeout_s) {
            std::string blob = metadata;
            py::gil_scoped_release unlocked;
            e.ConnectUpstream(peer, blob, timeout_s);
          },
          py::arg("peer"), py::arg("metadata"), py::arg("timeout_s"),
          "Connects to a rank that is upstream's own Buffer, while that runs connect_ranks.")
      .def_property_readonly("num_bytes", &NixlEpEndpoint::num_bytes)
      .def_property_readonly("dropped_rows", [](const NixlEpEndpoint&) { return 0; })
      .def_property_readonly("invalid_ids", [](const NixlEpEndpoint&) { return 0; });
  BindEndpoint(endpoint);
  BindSetEndpoint<NixlEpEndpoint>(m, "set_nixl_ep_endpoint");
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
        py::arg("combine_finish") = Handler(JaxNixlepCombineFinishCuda), py::arg("mark") = Handler(JaxNixlepMarkCuda),
        py::arg("nixl_ep_dispatch") = Handler(JaxNixlepNixlEpDispatchCuda),
        py::arg("nixl_ep_combine") = Handler(JaxNixlepNixlEpCombineCuda));
  });
  m.def("num_launches", &cuda::NumLaunches, "Calls of handlers so far; replays of a command buffer make none.");
  m.def("elapsed_us", &cuda::ElapsedUs, py::arg("start"), py::arg("end"), "Time between two marks, for measurements.");
  BindSetEndpoint<CudaEndpoint>(m);

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

  py::class_<CudaEndpoint, std::shared_ptr<CudaEndpoint>> endpoint(m, "Endpoint",
                                                                   "A rank's end of a group; see ffi/cuda/endpoint.h.");
  endpoint
      .def(py::init(&MakeEndpoint), py::kw_only(), py::arg("device"), py::arg("rank"), py::arg("max_ranks"),
           py::arg("experts_per_rank"), py::arg("max_tokens"), py::arg("top_k"), py::arg("row_bytes"),
           py::arg("timeout_s"), py::arg("mask_late_peers"), Unlocked())
      .def(
          "address",
          [](const CudaEndpoint& e) {
            py::dict address = Address(e);
            address["fd"] = e.page_fd();
            return address;
          },
          "Where the region is, for `connect_nixl` of the peers, and what `map_peer` needs.")
      .def("map_peer", &CudaEndpoint::MapPeer, py::arg("peer"), py::arg("pid"), py::arg("fd"), py::arg("nonce"),
           Unlocked(), "False: peers are reached through NIXL; the death of one of this machine will show, though.")
      .def_property_readonly("num_bytes", [](const CudaEndpoint& e) { return e.num_bytes() + sizeof(cuda::Control); })
      .def_property_readonly("dropped_rows", &CudaEndpoint::dropped_rows)
      .def_property_readonly("invalid_ids", &CudaEndpoint::invalid_ids);
  BindElastic(endpoint);
  BindEndpoint(endpoint);
  BindNixlEp(m);
}
