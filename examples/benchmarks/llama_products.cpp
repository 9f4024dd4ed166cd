// llama.cpp's products of Q4_0 weights by Q8_0 activations, to count instructions of (products.py):
// llama_products KIND REPEATS makes a product of 32 rows by 512 inputs so often, with 16 tokens in gemm.
// Built from llama.cpp's folder: its ggml-cpu as a static library for the CPU in question, such as
//   cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF \
//     -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
//   cmake --build build --target ggml-cpu
//   c++ -O2 -static llama_products.cpp build/ggml/src/libggml-cpu.a build/ggml/src/libggml-base.a \
//     -o llama_products

#include <cstdint>
#include <cstdlib>
#include <cstring>

using Product = void(int, float *, size_t, const void *, const void *, int, int);
extern "C" {
Product ggml_gemv_q4_0_4x4_q8_0, ggml_gemv_q4_0_4x8_q8_0, ggml_gemv_q4_0_8x8_q8_0;
Product ggml_gemm_q4_0_4x4_q8_0, ggml_gemm_q4_0_4x8_q8_0, ggml_gemm_q4_0_8x8_q8_0;
void ggml_cpu_init(void);
}

int main(int argc, char **argv) {
  static uint8_t weights[1 << 20], activations[1 << 20];
  static float out[1 << 16];
  const struct {
    const char *name;
    Product *product;
    int tokens;
  } table[] = {
      {"gemv_4x4", ggml_gemv_q4_0_4x4_q8_0, 1}, {"gemv_4x8", ggml_gemv_q4_0_4x8_q8_0, 1},
      {"gemv_8x8", ggml_gemv_q4_0_8x8_q8_0, 1}, {"gemm_4x4", ggml_gemm_q4_0_4x4_q8_0, 16},
      {"gemm_4x8", ggml_gemm_q4_0_4x8_q8_0, 16}, {"gemm_8x8", ggml_gemm_q4_0_8x8_q8_0, 16},
  };
  if (argc != 3) return 2;
#ifndef __x86_64__  // it fills tables, which takes minutes in single steps and which x86 does not read
  ggml_cpu_init();
#endif
  for (auto &row : table)
    if (!strcmp(row.name, argv[1]))
      for (int i = 0; i < atoi(argv[2]); i++)
        row.product(512, out, 32, weights, activations, row.tokens, 32);
  _Exit(0);
}
