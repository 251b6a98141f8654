//! A sliding window over counters that mostly rise: tells a repeat from a newcomer in bounded memory. Used for writes
//! (the store) and for peer frames (the transport). A leaf.

/// Which of the last [`Window::size`] counters were seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    highest: u64,
    /// Bit `c % size` tells of counter `c`, for `c` in `highest - size + 1 ..= highest`.
    bits: Vec<u64>,
}

/// What a [`Window`] says of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Not before; it is marked now.
    New,
    /// Before.
    Repeat,
    /// So far below the highest that nobody remembers.
    TooOld,
}

impl Window {
    /// An empty window over `size` counters, a multiple of 64. Counter 0 counts as seen.
    pub fn new(size: usize) -> Self {
        assert!(size > 0 && size.is_multiple_of(64), "a window of {size} counters");
        Window { highest: 0, bits: vec![0; size / 64] }
    }

    pub fn size(&self) -> u64 {
        self.bits.len() as u64 * 64
    }

    /// Tells whether `counter` was seen, and marks it.
    pub fn mark(&mut self, counter: u64) -> Seen {
        if counter > self.highest {
            // Slots between the two are reused: forget what they said of the counters that fall out.
            let skipped = (counter - self.highest - 1).min(self.size());
            for between in counter - skipped..counter {
                self.slot(between, |word, bit| *word &= !bit);
            }
            self.highest = counter;
            self.slot(counter, |word, bit| *word |= bit);
            return Seen::New;
        }
        if counter == 0 || self.highest - counter >= self.size() {
            return if counter == 0 && self.highest < self.size() { Seen::Repeat } else { Seen::TooOld };
        }
        self.slot(counter, |word, bit| {
            let seen = if *word & bit == 0 { Seen::New } else { Seen::Repeat };
            *word |= bit;
            seen
        })
    }

    /// The highest counter seen, and the bits, to be kept in a snapshot.
    pub fn parts(&self) -> (u64, &[u64]) {
        (self.highest, &self.bits)
    }

    /// The inverse of [`Window::parts`]; `None` for what no window looks like.
    pub fn from_parts(highest: u64, bits: Vec<u64>) -> Option<Self> {
        if bits.is_empty() {
            return None;
        }
        let mut window = Window { highest, bits };
        let marked = window.slot(highest, |word, bit| *word & bit != 0);
        // Counter 0 is never marked, so that an empty window has no bits.
        (marked == (highest > 0)).then_some(window)
    }

    fn slot<T>(&mut self, counter: u64, then: impl FnOnce(&mut u64, u64) -> T) -> T {
        let slot = counter % self.size();
        then(&mut self.bits[(slot / 64) as usize], 1 << (slot % 64))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_jump_of_more_than_the_window_forgets_everything() {
        let mut window = Window::new(64);
        assert_eq!(window.mark(5), Seen::New);
        assert_eq!(window.mark(u64::MAX), Seen::New);
        assert_eq!(window.mark(5), Seen::TooOld);
        assert_eq!(window.mark(u64::MAX - 63), Seen::New);
        assert_eq!(window.mark(u64::MAX - 64), Seen::TooOld);
    }

    #[test]
    fn a_window_goes_on_from_its_parts() {
        let mut window = Window::new(64);
        assert_eq!([3, 9, 70].map(|counter| window.mark(counter)), [Seen::New; 3]);
        let (highest, bits) = window.parts();
        let mut again = Window::from_parts(highest, bits.to_vec()).unwrap();
        assert_eq!(again, window);
        assert_eq!([9, 8, 3].map(|counter| again.mark(counter)), [Seen::Repeat, Seen::New, Seen::TooOld]);
        assert!(Window::from_parts(0, vec![0]).is_some());
        for (highest, bits) in [(0, vec![]), (5, vec![0]), (0, vec![1])] {
            assert_eq!(Window::from_parts(highest, bits), None);
        }
    }

    proptest! {
        /// The window agrees with a set that remembers everything.
        #[test]
        fn no_counter_is_new_twice(counters in prop::collection::vec(1u64..400, 0..400)) {
            let mut window = Window::new(128);
            let (mut seen, mut highest) = (HashSet::new(), 0);
            for counter in counters {
                let expected = if counter + 128 <= highest {
                    Seen::TooOld
                } else if seen.insert(counter) {
                    Seen::New
                } else {
                    Seen::Repeat
                };
                highest = highest.max(counter);
                prop_assert_eq!(window.mark(counter), expected);
            }
        }
    }
}
