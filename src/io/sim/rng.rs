//! The only source of chance in the imaginary disk: the same seed, the same disaster.

/// A splitmix64 generator.
#[derive(Clone)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Rng {
        Rng(seed)
    }
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number in `0..n`; 0 if there is none.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        // The bias is far below what a test could notice.
        self.next().checked_rem(n).unwrap_or(0)
    }
    /// True in `n` of `of` cases.
    pub(super) fn chance(&mut self, n: u64, of: u64) -> bool {
        self.below(of) < n
    }
    pub(super) fn fill(&mut self, buf: &mut [u8]) {
        for part in buf.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            part.copy_from_slice(&bytes[..part.len()]);
        }
    }
}
