/* QEMU plugin: how often is each instruction at addresses lo <= a < hi executed, and how many bytes
   do they load?
   Arguments: lo=, hi= (numbers), out= (file for lines "address count", in decimal), loads=1 (also a
   last line "loaded bytes"; slow).
   It declares what it needs of the plugin interface itself, so that no header is needed. */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct block;
struct instruction;
typedef uint64_t plugin_id;

#define EXPORT __attribute__((visibility("default")))
#define INLINE_ADD_U64 0
#define NO_REGISTERS 0
#define ACCESSES 3 /* QEMU 7.2 takes loads for stores when asked for one of them */

size_t qemu_plugin_tb_n_insns(const struct block *);
struct instruction *qemu_plugin_tb_get_insn(const struct block *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct instruction *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct instruction *, int, void *, uint64_t);
void qemu_plugin_register_vcpu_mem_cb(struct instruction *,
                                      void (*)(unsigned, uint32_t, uint64_t, void *), int, int,
                                      void *);
unsigned qemu_plugin_mem_size_shift(uint32_t);
bool qemu_plugin_mem_is_store(uint32_t);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct block *));
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);

EXPORT int qemu_plugin_version = 1;

static uint64_t *counts, low, high, bytes;
static bool loads;
static const char *out;

static void accessed(unsigned cpu, uint32_t what, uint64_t address, void *unused) {
  if (!qemu_plugin_mem_is_store(what)) bytes += (uint64_t)1 << qemu_plugin_mem_size_shift(what);
}

static void translated(plugin_id id, struct block *block) {
  size_t n = qemu_plugin_tb_n_insns(block);
  for (size_t i = 0; i < n; i++) {
    struct instruction *one = qemu_plugin_tb_get_insn(block, i);
    uint64_t at = qemu_plugin_insn_vaddr(one);
    if (at < low || at >= high) continue;
    qemu_plugin_register_vcpu_insn_exec_inline(one, INLINE_ADD_U64, &counts[at - low], 1);
    if (loads) qemu_plugin_register_vcpu_mem_cb(one, accessed, NO_REGISTERS, ACCESSES, NULL);
  }
}

static void finished(plugin_id id, void *unused) {
  FILE *file = fopen(out, "w");
  if (!file) return;
  for (uint64_t i = 0; i < high - low; i++)
    if (counts[i]) fprintf(file, "%" PRIu64 " %" PRIu64 "\n", low + i, counts[i]);
  if (loads) fprintf(file, "loaded %" PRIu64 "\n", bytes);
  fclose(file);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  for (int i = 0; i < argc; i++) {
    if (!strncmp(argv[i], "lo=", 3)) low = strtoull(argv[i] + 3, NULL, 0);
    if (!strncmp(argv[i], "hi=", 3)) high = strtoull(argv[i] + 3, NULL, 0);
    if (!strncmp(argv[i], "out=", 4)) out = strdup(argv[i] + 4);
    if (!strncmp(argv[i], "loads=1", 7)) loads = true;
  }
  if (!out || high < low || !(counts = calloc(high - low + 1, sizeof *counts))) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finished, NULL);
  return 0;
}
