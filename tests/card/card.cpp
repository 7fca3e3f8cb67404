// A graphics card for tests: a device of its own in the processor's memory, which refuses what a real card refuses.
//
// Every operation is carried out by the processor, but tensors of the card and of the processor do not mix, and random
// numbers for the card do not come from a generator of the processor.

#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_fused_sdp_choice_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

constexpr auto CARD = c10::DeviceType::PrivateUse1;
const c10::Device card(CARD, 0);
const c10::Stream stream(c10::Stream::DEFAULT, card);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* place = size ? std::malloc(size) : nullptr;
    return {place, place, &std::free, card};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} memory;

REGISTER_ALLOCATOR(CARD, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CARD; }
  c10::Device exchangeDevice(c10::Device) const override { return card; }
  c10::Device getDevice() const override { return card; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream getDefaultStream(c10::Device) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override { *event = &memory; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
} hooks;

const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

at::Tensor on_processor(const at::Tensor& tensor) {
  auto options = tensor.options().device(c10::kCPU);
  c10::Storage same(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                    c10::DataPtr(tensor.storage().mutable_data(), c10::kCPU), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  auto side = [](const at::Tensor& tensor) { return tensor.device() == card ? on_processor(tensor) : tensor; };
  side(to).copy_(side(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return on_processor(tensor).item(); }

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (tensor.sizes() == sizes && !format) return tensor;
  auto* impl = tensor.unsafeGetTensorImpl();
  auto bytes = (c10::multiply_integers(sizes) + tensor.storage_offset()) * tensor.itemsize();
  if (bytes > tensor.storage().nbytes()) {
    auto grown = memory.allocate(bytes);
    std::memcpy(grown.get(), tensor.storage().data(), tensor.storage().nbytes());
    impl->unsafe_storage().set_data_ptr_noswap(std::move(grown));
    impl->unsafe_storage().set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(sizes);
  if (format) impl->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor unfold(const at::Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dimension, size, step);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                              offset.guard_int(__FILE__, __LINE__));
  return tensor;
}

int64_t math(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
             std::optional<double>, bool) {
  return 0;
}

using Numbers = c10::IntArrayRef;

at::Tensor alike(const at::Tensor& tensor) {
  TORCH_CHECK(!tensor.defined() || tensor.device() == card, "convolution: Expected all tensors to be on the same device");
  return tensor.defined() ? on_processor(tensor) : tensor;
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       Numbers stride, Numbers padding, Numbers dilation, bool transposed, Numbers output_padding,
                       int64_t groups) {
  auto offset = bias ? std::optional<at::Tensor>(alike(*bias)) : std::nullopt;
  return at::convolution(alike(x), alike(weight), offset, stride, padding, dilation, transposed, output_padding, groups)
      .contiguous()
      .to(card);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, Numbers stride, Numbers padding,
    Numbers dilation, bool transposed, Numbers output_padding, int64_t groups, std::array<bool, 3> wanted) {
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(alike(gradient), alike(x), alike(weight), Numbers({weight.size(transposed ? 1 : 0)}),
                               stride, padding, dilation, transposed, output_padding, groups, wanted);
  auto back = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(card) : tensor; };
  return {back(of_x), back(of_weight), back(of_bias)};
}

void record_stream(at::Tensor&, c10::Stream) {}

// Where a real card takes indices of the processor too.
const std::set<std::string> indexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                        "aten::_unsafe_index"};

void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  bool foreign = false, own = false;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    own |= tensor.device() == card;
    foreign |= tensor.device().is_cpu() && tensor.dim() > 0;
  };
  const auto& name = op.schema().name();
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) look(tensor);
    if (value.isGenerator())
      TORCH_CHECK(value.toGenerator().device() == card, name, ": Expected a generator of the card, found one of the "
                  "processor");
  }
  TORCH_CHECK(!(own && foreign) || indexing.count(name), name,
              ": Expected all tensors to be on the same device, but found at least two devices, npu:0 and cpu!");
}

void processor(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&processor>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("resize_", resize);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("as_strided", as_strided);
  library.impl("unfold", unfold);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("_fused_sdp_choice", math);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("record_stream", record_stream);
}
