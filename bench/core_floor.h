/* What the suites call: loops over the core's own functions, and the floors they stand beside. Read by cffi. */

/* Nanoseconds a call of `rounds` passes over `iovas`. A walk's address depends on the result of the walk before it. */
double bench_walk(vio_engine *engine, uint32_t ioasid, const uint64_t *iovas, uint64_t count, uint64_t rounds);
double bench_iotlb(vio_engine *engine, uint32_t ioasid, const uint64_t *iovas, uint64_t count, uint64_t rounds);
double floor_iotlb(const uint64_t *iovas, uint64_t count, uint64_t rounds, unsigned log2_sets);
double floor_memcpy(void *to, const void *from, uint64_t size, uint64_t rounds);
void floor_empty(const void *engine, uint32_t rid, uint32_t pasid, uint64_t iova, const void *buffer, uint64_t size,
                 int write);

/* Nanoseconds an entry. */
double floor_entries(uint64_t *entries, uint64_t count, uint64_t rounds);
double floor_clear(uint64_t *entries, uint64_t count, uint64_t rounds);

uint64_t bench_walk_one(vio_engine *engine, uint32_t ioasid, uint64_t iova); /* HVA, 0: a fault */
void bench_table(vio_engine *engine, uint32_t ioasid, vio_table *out);
uint64_t bench_space_bytes(void);
int bench_fill(void *map, void *table, const uint64_t *gpas, uint64_t count, uint64_t page);

/* walk_floor.c */
struct floor_tables {
    uint64_t root1, root2; /* GPA, HVA */
    uint32_t levels1, levels2, granule1, granule2, shifted1, shifted2;
};

double floor_walk(const struct floor_tables *tables, const uint64_t *iovas, uint64_t count, uint64_t rounds);
uint64_t floor_walk_one(const struct floor_tables *tables, uint64_t iova); /* HVA */
int bench_formats(void);
const char *bench_format_name(int format);
int bench_config(int format, unsigned granule, int host, vio_table *out); /* 0: there is none */
int bench_shifted(int format);
