// What a kernel may use of a GPU: numbers, threads, barriers, memory, asynchronous copies, tensor cores. All of its
// memory traffic goes through here. Two versions: for GPUs (gpu_device.cuh) and for the emulator of csrc/simt
// (gpu_emulated.h), so that the tests run the very source that nvcc compiles.
//
//   Half, BFloat16                      16-bit numbers; to_float(x), from_float<T>(x) rounds to nearest even
//   Word<bytes>                         an unsigned word of 2, 4, 8 or 16 bytes
//   thread(), lane(), warp(), block()   where this thread is; grids and blocks have one dimension
//   shared_memory()                     the block's, 16-byte aligned
//   sync_block(), sync_warp(), shuffle_xor(value, mask)
//   load_global, store_global, load_shared, store_shared
//   copy_async<bytes>(shared, global, source_bytes), commit_copies(), wait_copies<left>()
//                                       bytes = 4, 8, 16; what exceeds source_bytes becomes zero
//   load_matrices(r, row), load_matrices_transposed(r, row)
//                                       ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8
//   multiply_add<T>(d, a, b)            mma.m16n8k16, T = Half or BFloat16
//   multiply_add_tf32(d, a, b)          mma.m16n8k8; to_tf32(x) rounds a float for it
//   launch<kernel>(geometry, stream, args...)
//   FASTENC_KERNEL(threads), FASTENC_KERNEL(threads, blocks): registers for that many blocks on a multiprocessor
//   FASTENC_DEVICE
//   PLANTED(name)                       a mistake made on purpose in tests; false on a GPU
#pragma once

#ifdef __CUDACC__
#include "gpu_device.cuh"
#else
#include "../simt/gpu_emulated.h"
#endif
