//! The CRC32C of any part of a segment, in less than a microsecond, however long the part is. Recovery looks for frames at
//! each place behind the end of a log, and what lies there, the remains of an earlier life of the file, may claim at
//! each place to be a frame of megabytes: values come from clients.
//!
//! A checksum is linear. With `shift(c, n)` for what becomes of the checksum c by n more bytes of zero, that of A and
//! B, one behind the other, is `shift(crc(A), len(B)) ^ crc(B)`. So two that begin at the same place tell that of
//! what is between them.

const BLOCK_BYTES: usize = 1 << 10;
/// CRC32C's polynomial (Castagnoli), its bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What becomes of a checksum by some number of zero bytes: for each of its bits, the bits that this one leads to.
type Operator = [u32; 32];

/// The bytes, and what it takes to tell the checksum of any of them.
pub struct Ranges<'a> {
    bytes: &'a [u8],
    /// The checksum of all bytes before each block.
    before: Vec<u32>,
    /// For 1, 2, 4, … zero bytes.
    shifts: Vec<Operator>,
}

impl<'a> Ranges<'a> {
    /// Reads all of the bytes, once.
    pub fn new(bytes: &'a [u8]) -> Self {
        let mut before = vec![0];
        before.extend(bytes.chunks(BLOCK_BYTES).scan(0, |crc, block| {
            *crc = crc32c::crc32c_append(*crc, block);
            Some(*crc)
        }));
        let bit = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
        let one: Operator = std::array::from_fn(|n| (0..8).fold(1 << n, |crc, _| bit(crc)));
        let twice = |operator: &Operator| Some(operator.map(|crc| apply(operator, crc)));
        let shifts = std::iter::successors(Some(one), twice).take(usize::BITS as usize).collect();
        Ranges { bytes, before, shifts }
    }

    /// As `crc32c_append(crc, &bytes[start..start + len])`.
    pub fn append(&self, crc: u32, start: usize, len: usize) -> u32 {
        let bits = (0..self.shifts.len()).filter(|bit| len >> bit & 1 == 1);
        let shifted = bits.fold(crc ^ self.up_to(start), |crc, bit| apply(&self.shifts[bit], crc));
        shifted ^ self.up_to(start + len)
    }

    fn up_to(&self, end: usize) -> u32 {
        let block = end / BLOCK_BYTES;
        crc32c::crc32c_append(self.before[block], &self.bytes[block * BLOCK_BYTES..end])
    }
}

fn apply(operator: &Operator, crc: u32) -> u32 {
    let bits = (0..32).filter(|bit| crc >> bit & 1 == 1);
    bits.fold(0, |sum, bit| sum ^ operator[bit])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Each length has its own shifts.
    #[test]
    fn a_long_part_has_the_checksum_of_its_bytes() {
        let bytes: Vec<u8> = (0..9u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let ranges = Ranges::new(&bytes);
        for len in (0..=23).flat_map(|bit| [1 << bit, (1 << bit) - 1]).chain([5 << 20, 0x7f_1234]) {
            let expected = crc32c::crc32c_append(7, &bytes[1001..1001 + len]);
            assert_eq!(ranges.append(7, 1001, len), expected, "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn a_part_has_the_checksum_of_its_bytes(
            bytes in prop::collection::vec(any::<u8>(), 0..4 * BLOCK_BYTES),
            ends in any::<[prop::sample::Index; 2]>(),
            crc in any::<u32>(),
        ) {
            let [start, end] = ends.map(|end| end.index(bytes.len() + 1));
            let part = start.min(end)..start.max(end);
            let expected = crc32c::crc32c_append(crc, &bytes[part.clone()]);
            prop_assert_eq!(Ranges::new(&bytes).append(crc, part.start, part.len()), expected);
        }
    }
}
