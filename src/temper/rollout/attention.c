/* One step of decoding attention: R rows, n of each prompt, against the prompt's keys and values and their own. See decode.py for layouts.

   q         [R, H, D]        scaled                  begin  [P]  the first column of a prompt that is not padding
   prompt_k  [P, G, D, L]     prompt_v [P, G, L, E]   place  [R]  prompt * n + sample of each row
   own_k     [R, G, room, D]  own_v [R, G, room, E]   of which first..t-1 are seen; of the prompt, cut..L-1
   scores    [threads, L + t] scratch                 out    [R, H, E]
*/
#include <math.h>
#include <stdint.h>
#include <string.h>

/* exp for x <= 0, to 2e-7 relative: 2^k times a polynomial on [-ln2/2, ln2/2]; in a loop, unlike expf, it runs in vectors */
static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  float k = floorf(x * 1.44269504f + 0.5f), f = x - k * 0.693359375f + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  union { int32_t i; float f; } two = {((int32_t)k + 127) << 23};
  return p * two.f;
}

void attend(const float *q, const float *prompt_k, const float *prompt_v, const float *own_k, const float *own_v, const int64_t *begin,
            const int64_t *place, int64_t R, int64_t H, int64_t G, int64_t D, int64_t E, int64_t L, int64_t room, int64_t n, int64_t first,
            int64_t t, int64_t cut, int64_t threads, float *scores, float *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    float *restrict s = scores + part * (L + t);
    for (int64_t r = R * part / threads; r < R * (part + 1) / threads; r++) {
      const int64_t p = place[r] / n, from = begin[p] > cut ? begin[p] : cut, seen = L > from ? L - from : 0, all = seen + t - first;
      for (int64_t h = 0; h < H; h++) {
        const int64_t g = h / (H / G);
        const float *restrict a = q + (r * H + h) * D, *pk = prompt_k + (p * G + g) * D * L + from, *pv = prompt_v + ((p * G + g) * L + from) * E;
        const float *ok = own_k + ((r * G + g) * room + first) * D, *ov = own_v + ((r * G + g) * room + first) * E;
        float *restrict o = out + (r * H + h) * E;
        memset(s, 0, seen * sizeof(float));
        for (int64_t d = 0; d < D; d++)
          for (int64_t l = 0; l < seen; l++) s[l] += a[d] * pk[d * L + l];
        for (int64_t l = 0; l < t - first; l++) {
          float dot = 0;
          for (int64_t d = 0; d < D; d++) dot += a[d] * ok[l * D + d];
          s[seen + l] = dot;
        }
        float most = s[0], total = 0;
        for (int64_t l = 1; l < all; l++) most = s[l] > most ? s[l] : most;
        for (int64_t l = 0; l < all; l++) total += s[l] = exponential(s[l] - most);
        memset(o, 0, E * sizeof(float));
        for (int64_t l = 0; l < seen; l++)
          for (int64_t e = 0; e < E; e++) o[e] += s[l] * pv[l * E + e];
        for (int64_t l = 0; l < t - first; l++)
          for (int64_t e = 0; e < E; e++) o[e] += s[seen + l] * ov[l * E + e];
        for (int64_t e = 0; e < E; e++) o[e] /= total;
      }
    }
  }
}
