// The only place that declares operators: the table of contents of the library. Formulas, shapes
// and dtypes are in each op's header (csrc/ops/<op>/<op>.h) and in docs/ops.md.
#include "torch/registration.h"

RESQ_LIBRARY(m) {
  m.def(
      "mixed_quantize(Tensor x, SymInt n_hi, int lo_bits=4, bool? packed=None, "
      "bool symmetric=False, float clip=1.0) -> (Tensor q_lo, Tensor q_hi, Tensor params)");
  m.def(
      "rms_norm_quantize(Tensor x, Tensor? residual, Tensor? weight, float eps, SymInt n_hi, "
      "int lo_bits=4, bool? packed=None, bool symmetric=False, float clip=1.0) "
      "-> (Tensor q_lo, Tensor q_hi, Tensor params, Tensor new_residual)");
  m.def(
      "silu_mul_hadamard_quantize(Tensor gate_up, bool hadamard=True, SymInt n_hi=0, "
      "int lo_bits=4, bool? packed=None, bool symmetric=False, float clip=1.0, "
      "SymInt hadamard_block=0) -> (Tensor q_lo, Tensor q_hi, Tensor params)");
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("hadamard(Tensor x, float scale=1.0) -> Tensor");
  m.def(
      "gptq_block(Tensor targets, Tensor weight, Tensor feedback, Tensor scale, int bits) "
      "-> (Tensor codes, Tensor errors, Tensor exact)");
  m.def("search_scale(Tensor weight, int bits) -> Tensor");
  m.def("pack_weight(Tensor codes_lo, Tensor codes_hi) -> Tensor");
  m.def(
      "unpack_weight(Tensor packed_weight, SymInt n, SymInt k_lo, SymInt k_hi) "
      "-> (Tensor codes_lo, Tensor codes_hi)");
  m.def(
      "embedding(Tensor ids, Tensor packed_weight, Tensor weight_scale, SymInt k_lo, SymInt k_hi, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "mixed_gemm(Tensor q_lo, Tensor q_hi, Tensor params, Tensor packed_weight, "
      "Tensor weight_scale, Tensor weight_sum, Tensor? bias, ScalarType out_dtype) -> Tensor");
  m.def(
      "kv_append(Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? key_rotation, "
      "Tensor(a!) cache, Tensor slot_mapping, int hi_bits=8, Tensor? q=None) -> Tensor");
  m.def(
      "kv_attention(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, "
      "Tensor query_starts, float scale, ScalarType? out_dtype=None, int? head_dim_hi=None) "
      "-> Tensor");
  m.def(
      "kv_dequantize(Tensor cache, Tensor block_table, Tensor seq_lens, SymInt max_tokens, "
      "int head_dim, ScalarType dtype) -> (Tensor k, Tensor v)");
  m.def(
      "decoder_layers(Tensor x, Tensor cos, Tensor sin, Tensor(a!)[] caches, Tensor slot_mapping, "
      "Tensor block_table, Tensor seq_lens, Tensor query_starts, Tensor?[] weights, float eps, "
      "float scale, int[] n_hi, float[] clip, int lo_bits=4, bool symmetric=False, int hi_bits=8, "
      "bool hadamard=True, int hadamard_block=0) -> (Tensor out, Tensor residual)");
  m.def(
      "prepare_decode_step(Tensor x, Tensor cos, Tensor sin, Tensor[] caches, Tensor block_table, "
      "Tensor?[] weights, float eps, float scale, int[] n_hi, float[] clip, int lo_bits=4, "
      "bool symmetric=False, int hi_bits=8, bool hadamard=True, int hadamard_block=0) -> Tensor");
  m.def("decode_step(Tensor step, Tensor x, Tensor(a!) seq_lens) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_missing() -> str");
  m.def("cuda_family(int device) -> str");
  m.def("cuda_pdl(int device) -> str");
  m.def("cuda_device(int device) -> int[]");
  m.def("mixed_gemm_kernel(int rows, int n, int k_lo, int k_hi, bool packed, int device) -> str");
  m.def(
      "mixed_gemm_choices(int rows, int n, int k_lo, int k_hi, bool packed, int device) -> str[]");
  m.def("force_kernel(str op, str choice) -> str");
}
