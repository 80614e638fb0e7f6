/* Writes every NVTX call of a process as one JSON object a line, in place of a profiler.
 *
 * NVTX loads the library that NVTX_INJECTION64_PATH names and calls InitializeInjectionNvtx2 with
 * a function that hands out its callback tables. The declarations below are the part of that
 * public binary interface (NVIDIA's nvtx3 headers, nvToolsExt.h and nvtxDetail/nvtxTypes.h) which
 * the recorder needs, so that it builds without a CUDA toolkit.
 *
 * The file is the value of NVTX_RECORDER_FILE; a process appends to it, each line in one write. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  union {
    uint64_t u64;
    int64_t i64;
    double f64;
  } payload;
  int32_t message_type;
  union {
    const char *ascii;
    const void *registered;
  } message;
} attributes_t;

typedef struct {
  uint64_t schema;
  size_t size;
  const unsigned char *bytes;
} payload_t;

typedef struct {
  size_t struct_size;
  int (*get_module)(int module, void ****table, unsigned *size);
} callbacks_t;

enum { EXPORT_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum {
  RANGE_START = 2, RANGE_END = 3, RANGE_PUSH = 4, RANGE_POP = 5, NAME_CATEGORY = 8,
  REGISTER_STRING = 10, CREATE_DOMAIN = 12
};
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3, PAYLOAD_I64 = 2 };
#define PAYLOAD_BINARY ((int32_t)0xDFBD0009)

static int file = -1;
static uint64_t next_id = 1;

/* A domain or registered string is a copy of its text, so that a handle is its own name. */
static const void *named(const char *text) { return strdup(text ? text : ""); }

static void line(const char *event, const void *domain, uint64_t id, const attributes_t *a) {
  char text[4096];
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  int n = snprintf(text, sizeof text,
                   "{\"event\": \"%s\", \"domain\": \"%s\", \"time_ns\": %lld, \"pid\": %d, "
                   "\"thread\": %ld, \"id\": %llu",
                   event, domain ? (const char *)domain : "",
                   (long long)now.tv_sec * 1000000000 + now.tv_nsec, (int)getpid(),
                   (long)syscall(SYS_gettid), (unsigned long long)id);
  if (a) {
    const char *name = a->message_type == MESSAGE_REGISTERED || a->message_type == MESSAGE_ASCII
                           ? a->message.ascii : "";
    n += snprintf(text + n, sizeof text - n, ", \"name\": \"%s\", \"category\": %u, \"color\": %u",
                  name, a->category, a->color);
    if (a->payload_type == PAYLOAD_I64)
      n += snprintf(text + n, sizeof text - n, ", \"value\": %lld", (long long)a->payload.i64);
    if (a->payload_type == PAYLOAD_BINARY) {
      const payload_t *payload = (const payload_t *)(uintptr_t)a->payload.u64;
      n += snprintf(text + n, sizeof text - n, ", \"payload\": \"");
      for (size_t i = 0; i < payload->size && n + 8 < (int)sizeof text; i++)
        n += snprintf(text + n, sizeof text - n, "%02x", payload->bytes[i]);
      n += snprintf(text + n, sizeof text - n, "\"");
    }
  }
  n += snprintf(text + n, sizeof text - n, "}\n");
  if (write(file, text, n) != n) perror("nvtx_recorder");
}

static const void *create_domain(const char *name) { return named(name); }
static const void *register_string(const void *domain, const char *text) {
  (void)domain;
  return named(text);
}
static void name_category(const void *domain, uint32_t category, const char *name) {
  attributes_t a = {.category = category, .message_type = MESSAGE_ASCII, .message.ascii = name};
  line("category", domain, 0, &a);
}
static int push(const void *domain, const attributes_t *a) {
  line("push", domain, 0, a);
  return 0;
}
static int pop(const void *domain) {
  line("pop", domain, 0, NULL);
  return 0;
}
static uint64_t start(const void *domain, const attributes_t *a) {
  uint64_t id = __atomic_fetch_add(&next_id, 1, __ATOMIC_RELAXED);
  line("start", domain, id, a);
  return id;
}
static void end(const void *domain, uint64_t id) { line("end", domain, id, NULL); }

int InitializeInjectionNvtx2(const void *(*get_export_table)(uint32_t)) {
  const callbacks_t *callbacks = get_export_table(EXPORT_CALLBACKS);
  const char *path = getenv("NVTX_RECORDER_FILE");
  void ***table;
  unsigned size;
  if (!path || !callbacks || !callbacks->get_module(MODULE_CORE2, &table, &size)) return 0;
  if (file < 0) file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0 || size <= CREATE_DOMAIN) return 0;
  *table[RANGE_START] = (void *)start;
  *table[RANGE_END] = (void *)end;
  *table[RANGE_PUSH] = (void *)push;
  *table[RANGE_POP] = (void *)pop;
  *table[NAME_CATEGORY] = (void *)name_category;
  *table[REGISTER_STRING] = (void *)register_string;
  *table[CREATE_DOMAIN] = (void *)create_domain;
  return 1;
}
