/* SHA-256 by the SHA instructions of x86 (Intel SDM volume 2: SHA256RNDS2, SHA256MSG1, SHA256MSG2). */
#include "sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* Four rounds a step; w[i % 4] holds four words of the schedule, t - 16 to t - 13 before a step and t to t + 3 after it. */
__attribute__((target("sha,sse4.1"))) static void compress(uint32_t state[8], const uint8_t *block)
{
	const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
	__m128i abef = _mm_set_epi32((int)state[0], (int)state[1], (int)state[4], (int)state[5]);
	__m128i cdgh = _mm_set_epi32((int)state[2], (int)state[3], (int)state[6], (int)state[7]);
	const __m128i abef_before = abef, cdgh_before = cdgh;
	__m128i w[4];

#pragma GCC unroll 16
	for (int i = 0; i < 16; i++) {
		__m128i *now = &w[i % 4], next = w[(i + 1) % 4], third = w[(i + 2) % 4], last = w[(i + 3) % 4];

		if (i < 4)
			*now = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)block + i), big_endian);
		else
			*now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(*now, next), _mm_alignr_epi8(last, third, 4)), last);
		__m128i input = _mm_add_epi32(*now, _mm_load_si128((const __m128i *)sha256_k + i));

		cdgh = _mm_sha256rnds2_epu32(cdgh, abef, input);
		abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(input, 0x0e));
	}
	abef = _mm_add_epi32(abef, abef_before);
	cdgh = _mm_add_epi32(cdgh, cdgh_before);
	state[0] = (uint32_t)_mm_extract_epi32(abef, 3);
	state[1] = (uint32_t)_mm_extract_epi32(abef, 2);
	state[2] = (uint32_t)_mm_extract_epi32(cdgh, 3);
	state[3] = (uint32_t)_mm_extract_epi32(cdgh, 2);
	state[4] = (uint32_t)_mm_extract_epi32(abef, 1);
	state[5] = (uint32_t)_mm_extract_epi32(abef, 0);
	state[6] = (uint32_t)_mm_extract_epi32(cdgh, 1);
	state[7] = (uint32_t)_mm_extract_epi32(cdgh, 0);
}

/* CPUID leaf 7 EBX bit 29: SHA; leaf 1 ECX bits 9 and 19: SSSE3 and SSE4.1. */
static int has_instructions(void)
{
	unsigned a, b, c, d;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 9) || !(c & 1u << 19))
		return 0;
	return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & 1u << 29;
}

sha256_compress *sha256_by_instruction(void)
{
	return has_instructions() ? compress : NULL;
}
#else
sha256_compress *sha256_by_instruction(void)
{
	return NULL;
}
#endif
