//! Long histories: appends that replace what was not committed, compactions and restarts in any order, over so many
//! small segments that most of them are freed. What comes back is always the same log kept in the plainest way.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Act {
    /// So many entries, from so far before the end as is not committed.
    Append {
        count: u64,
        back: u64,
    },
    /// So far below the committed end.
    Compact {
        below: u64,
    },
    Reopen,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (1..6u64, 0..4u64).prop_map(|(count, back)| Act::Append { count, back }),
        2 => (0..12u64).prop_map(|below| Act::Compact { below }),
        1 => Just(Act::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_long_history_comes_back_as_it_was(acts in prop::collection::vec(act(), 1..120)) {
        let disk = MemoryDisk::new();
        let mut wal = create(&disk).unwrap();
        let mut model = Model::default();
        let (mut base, mut committed, mut last, mut term) = (1, 1, 1, 1);
        for act in acts.into_iter().chain([Act::Reopen]) {
            match act {
                Act::Append { count, back } => {
                    let start = (last + 1 - back.min(last)).max(committed + 1);
                    term += u64::from(start <= last);
                    let append = append(term, start..start + count);
                    wal.append(std::slice::from_ref(&append)).unwrap();
                    model = model.with(&append);
                    (committed, last) = (start - 1, start + count - 1);
                }
                Act::Compact { below } => {
                    let index = committed.saturating_sub(below).max(base);
                    if let Some(entry) = model.entries.get(&index) {
                        wal.compact(index, entry.term).unwrap();
                        model = model.above(index);
                        base = index;
                    }
                }
                Act::Reopen => {
                    let (opened, recovered) = open(&disk).unwrap();
                    prop_assert_eq!(&Model::from(&recovered), &model);
                    prop_assert_eq!(recovered.compacted.map_or(1, |(index, _)| index), base);
                    wal = opened;
                }
            }
        }
    }
}
