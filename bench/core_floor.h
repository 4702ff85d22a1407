/* What core_bench.py calls: loops over the core's own functions, and the floors they stand beside. Read by cffi. */

typedef struct vio_engine vio_engine;

/* Nanoseconds a call of `rounds` passes over `iovas`. A walk's address depends on the result of the walk before it. */
double bench_walk(vio_engine *engine, uint32_t ioasid, const uint64_t *iovas, uint64_t count, uint64_t rounds);
double floor_walk(uint64_t root1, const void *root2, unsigned levels, const uint64_t *iovas, uint64_t count,
                  uint64_t rounds);
double bench_iotlb(vio_engine *engine, uint32_t ioasid, const uint64_t *iovas, uint64_t count, uint64_t rounds);
double floor_iotlb(const uint64_t *iovas, uint64_t count, uint64_t rounds, unsigned log2_sets);
double floor_memcpy(void *to, const void *from, uint64_t size, uint64_t rounds);
void floor_empty(const void *engine, uint32_t rid, uint32_t pasid, uint64_t iova, const void *buffer, uint64_t size,
                 int write);

const void *bench_stage2_root(vio_engine *engine, uint32_t ioasid);
