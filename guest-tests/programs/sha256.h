/* SHA-256, FIPS 180-4. */
#ifndef SHA256_H
#define SHA256_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
	uint32_t state[8];
	uint64_t length; /* bytes so far */
	uint8_t block[64];
};

typedef void sha256_compress(uint32_t state[8], const uint8_t *block);

extern const uint32_t sha256_k[64];

/* The compression function that this processor has an instruction for, or NULL. */
sha256_compress *sha256_by_instruction(void);

/* To be called once: the processor's instructions where it has them, unless plain is asked for. */
void sha256_choose(int plain);

void sha256_init(struct sha256 *hash);
void sha256_update(struct sha256 *hash, const void *data, size_t length);
void sha256_hex(struct sha256 *hash, char hex[65]); /* ends the hash; hex is terminated */

#endif
