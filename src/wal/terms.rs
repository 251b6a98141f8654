//! Which entries a log holds, by index and term, without what they say: a start tells by them what is left of the log
//! before it keeps any of it. Pure.

/// Contiguous indexes, each with the term of its entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    first: u64,
    len: u64,
    /// Where entries of one term begin, and that term. The first begin at or before `first`.
    runs: Vec<(u64, u64)>,
}

impl Terms {
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn first(&self) -> Option<u64> {
        (self.len > 0).then_some(self.first)
    }

    pub fn last(&self) -> Option<u64> {
        // In this order, for the last index may be the largest there is.
        (self.len > 0).then(|| self.first + (self.len - 1))
    }

    pub fn at(&self, index: u64) -> Option<u64> {
        let held = self.first().zip(self.last()).is_some_and(|(first, last)| (first..=last).contains(&index));
        let run = self.runs.partition_point(|(start, _)| *start <= index);
        held.then(|| self.runs[run - 1].1)
    }

    /// Adds the entry behind the last one, or the first one.
    pub fn push(&mut self, index: u64, term: u64) {
        if self.len == 0 {
            self.first = index;
        }
        assert_eq!(index - self.first, self.len, "an entry behind those from {}", self.first);
        if self.runs.last().is_none_or(|(_, last)| *last != term) {
            self.runs.push((index, term));
        }
        self.len += 1;
    }

    /// Forgets the entries from `index` on.
    pub fn cut(&mut self, index: u64) {
        if index <= self.first {
            *self = Terms::default();
        } else {
            self.len = self.len.min(index - self.first);
            self.runs.truncate(self.runs.partition_point(|(start, _)| *start < index));
        }
    }

    /// Forgets the entries up to `index`.
    pub fn forget(&mut self, index: u64) {
        if self.last().is_none_or(|last| last <= index) {
            *self = Terms::default();
        } else if self.first <= index {
            self.len -= index + 1 - self.first;
            self.first = index + 1;
            self.runs.drain(..self.runs.partition_point(|(start, _)| *start <= self.first) - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// As a map would have it, up to the largest index there is.
        #[test]
        fn they_are_as_a_map_has_them(
            first in prop_oneof![Just(0), 1..9u64, Just(u64::MAX - 40)],
            steps in prop::collection::vec((0..6u8, 0..40u64), 1..60),
        ) {
            let (mut terms, mut map) = (Terms::default(), BTreeMap::<u64, u64>::new());
            for (step, number) in steps {
                let at = first + number;
                match step {
                    0 => {
                        terms.cut(at);
                        map.retain(|index, _| *index < at);
                    }
                    1 => {
                        terms.forget(at);
                        map.retain(|index, _| *index > at);
                    }
                    _ => {
                        let next = map.last_key_value().map_or(Some(at), |(last, _)| last.checked_add(1));
                        let Some(next) = next else { continue };
                        terms.push(next, number / 10);
                        map.insert(next, number / 10);
                    }
                }
                let ends = (map.keys().next().copied(), map.keys().last().copied());
                prop_assert_eq!((terms.first(), terms.last(), terms.len()), (ends.0, ends.1, map.len() as u64));
                prop_assert_eq!(terms.is_empty(), map.is_empty());
                for index in first.saturating_sub(1)..=first + 40 {
                    prop_assert_eq!(terms.at(index), map.get(&index).copied());
                }
            }
        }
    }
}
