//! A data directory that the program made, damaged in one place and started again: either every acknowledged write is
//! served, or the program ends with an error that names the file. What the bytes mean is proved in `src/wal/tests`; this
//! is the same for whoever runs it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::harness::{Node, free_port, wait_for};
use crate::kept::{Content, Directory};

const FLAGS: &[&str] = &[
    "--tick=10ms",
    "--max-value-bytes=4MiB",
    "--snapshot-count=12",
    "--snapshot-catchup-entries=8",
    "--snapshot-catchup-bytes=1GiB",
    "--snapshot-log-bytes=1GiB",
];
const FIRST_SEGMENT: &str = "wal/0000000000000001.wal";
const SECOND_SEGMENT: &str = "wal/0000000000000002.wal";
const LAST_SEGMENT: &str = "wal/0000000000000003.wal";
const HEADER_BYTES: u64 = 4096;
/// The positions are the same in each run.
const SEED: u64 = 0x5eed_0008;

#[derive(Debug, Clone, Copy)]
enum Damage {
    Flip(u64),
    Cut(u64),
    Gone,
}

impl Damage {
    fn apply(self, directory: &mut Directory, file: &str) {
        if let Damage::Gone = self {
            directory.files.remove(file);
            return;
        }
        let mut bytes = directory.files[file].bytes();
        match self {
            Damage::Flip(at) => bytes[at as usize] ^= 1 << (at % 8),
            Damage::Cut(at) => bytes.truncate(at as usize),
            Damage::Gone => unreachable!("dealt with above"),
        }
        directory.files.insert(file.to_owned(), Content::of(&bytes));
    }
}

/// A directory that was served from, and what was acknowledged.
struct Sample {
    directory: Directory,
    writes: BTreeMap<String, Vec<u8>>,
    /// The key written last, and what it was before.
    last: (String, Vec<u8>),
    /// Where in the last segment the last frame begins.
    last_frame: u64,
    cluster: String,
}

/// Three segments that are all needed, and two snapshots: 18 small writes, 7 of 4 MiB, 5 small ones.
fn sample(root: &Path) -> Sample {
    let cluster = format!("http://127.0.0.1:{}", free_port());
    let mut node = Node::at(1, &cluster, &root.join("original"), FLAGS);
    node.start();
    node.wait_ready();
    let mut writes = BTreeMap::new();
    for n in 0..30 {
        let (key, value) = match n {
            18..25 => ("large".to_owned(), vec![0; (4 << 20) - n]),
            _ => (format!("key-{}", n % 20), format!("value {n}").into_bytes()),
        };
        node.must_put(&key, &value);
        writes.insert(key, value);
        if n % 12 == 11 {
            wait_for("a snapshot", || (node.status()?["snapshot"]["index"].as_u64()? + 12 > n as u64).then_some(()));
        }
    }
    let last = ("key-9".to_owned(), writes["key-9"].clone());
    node.must_put("key-9", "the last one");
    writes.insert("key-9".to_owned(), b"the last one".to_vec());
    node.kill();
    let directory = Directory::read(&node.dir);
    let names: Vec<&str> = directory.files.keys().map(String::as_str).collect();
    for segment in [FIRST_SEGMENT, SECOND_SEGMENT, LAST_SEGMENT] {
        assert!(names.contains(&segment), "{names:?}");
    }
    assert_eq!(names.iter().filter(|name| name.ends_with(".snap")).count(), 2, "{names:?}");
    let last_frame = *frames(&directory.files[LAST_SEGMENT].bytes()).last().unwrap();
    Sample { directory, writes, last, last_frame, cluster }
}

/// Where the frames of a segment begin.
fn frames(bytes: &[u8]) -> Vec<u64> {
    let mut starts = Vec::new();
    let mut at = HEADER_BYTES as usize;
    while let Some(header) = bytes.get(at..at + 16) {
        match u32::from_le_bytes(header[..4].try_into().unwrap()) as usize {
            0 => break,
            len => {
                starts.push(at as u64);
                at = (at + 16 + len).next_multiple_of(8);
            }
        }
    }
    starts
}

/// Numbers that look random and are the same each time (splitmix64).
struct Dice(u64);

impl Dice {
    fn within(&mut self, from: u64, to: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        from + (mixed ^ (mixed >> 31)) % (to - from)
    }
}

/// Every file, and of each its front, its middle, its end and what lies behind that.
fn damages(sample: &Sample) -> Vec<(String, Damage)> {
    let mut dice = Dice(SEED);
    let mut damages = Vec::new();
    for (name, content) in &sample.directory.files {
        let (used, size) = (content.used_bytes(), content.size_bytes);
        let mut add = |damage| damages.push((name.clone(), damage));
        add(Damage::Gone);
        // The spare may have been under way: zeros all of it.
        if name == "LOCK" || name.starts_with("wal/spare") {
            continue;
        }
        let mut flip = |from, to| add(Damage::Flip(dice.within(from, to)));
        flip(0, 40.min(used));
        flip(used / 3, used / 2);
        flip(used - 20, used);
        if name.ends_with(".wal") {
            flip(40, 56);
            flip(HEADER_BYTES, HEADER_BYTES + 16);
            flip(HEADER_BYTES + 16, HEADER_BYTES + 100);
        }
        add(Damage::Cut(dice.within(0, 40)));
        add(Damage::Cut(dice.within(used / 2, used)));
        if used < size {
            add(Damage::Cut(dice.within(used, size)));
        }
    }
    for frame in frames(&sample.directory.files[LAST_SEGMENT].bytes()) {
        damages.push((LAST_SEGMENT.to_owned(), Damage::Cut(frame)));
    }
    damages.push((LAST_SEGMENT.to_owned(), Damage::Flip(sample.last_frame + 4)));
    damages
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Outcome {
    Served,
    /// The last write is missing.
    Torn,
    Refused,
}

/// Starts from a damaged copy. Panics where what is served is wrong, or a refusal does not name the file.
fn judge(sample: &Sample, dir: &Path, file: &str, damage: Damage) -> Outcome {
    let mut directory = sample.directory.clone();
    damage.apply(&mut directory, file);
    directory.write(dir);
    let mut node = Node::at(1, &sample.cluster, dir, FLAGS);
    node.set_flags(&[FLAGS, &["--listen-peer", &format!("127.0.0.1:{}", free_port())]].concat());
    node.start();
    let served = wait_for(&format!("{file} with {damage:?}: it serves or it ends"), || {
        let ready = node.status().is_some_and(|status| status["role"] == "leader" && node.get("key-9").is_ok());
        if ready { Some(true) } else { (!node.is_running()).then_some(false) }
    });
    if !served {
        let (code, log) = (node.wait().code(), node.log());
        let complaint = log.lines().last().unwrap();
        assert_eq!(code, Some(1), "{file} with {damage:?}: {log}");
        // A snapshot that is missing has no name that the log could know.
        let named =
            if file.starts_with("snap/") && matches!(damage, Damage::Gone) { "/snap holds no snapshot" } else { file };
        assert!(complaint.starts_with("raftkv: ") && complaint.contains(named), "{file} with {damage:?}: {log}");
        return Outcome::Refused;
    }
    let mut torn = false;
    for (key, value) in &sample.writes {
        let found = node.must_get(key);
        let missing = (key, &found) == (&sample.last.0, &sample.last.1);
        assert!(found == *value || missing, "{file} with {damage:?}: {key} is {found:?}");
        torn |= missing;
    }
    node.must_put("more", "goes on");
    if torn { Outcome::Torn } else { Outcome::Served }
}

#[test]
fn a_damaged_directory_is_served_exactly_or_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample(root.path());
    let damages = damages(&sample);
    assert!(damages.len() >= 40, "{} damages", damages.len());
    let next = AtomicUsize::new(0);
    let outcomes = std::thread::scope(|scope| {
        let judges = [0, 1].map(|worker| {
            let (sample, damages, next, root) = (&sample, &damages, &next, root.path());
            scope.spawn(move || {
                let mut outcomes = Vec::new();
                while let Some((file, damage)) = damages.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let dir = root.join(format!("copy-{worker}"));
                    let outcome = judge(sample, &dir, file, *damage);
                    let torn = file == LAST_SEGMENT && matches!(damage, Damage::Flip(at) if *at >= sample.last_frame);
                    assert!(torn || outcome != Outcome::Torn, "{file} with {damage:?}: the last write is missing");
                    outcomes.push((file.clone(), *damage, outcome));
                    // Each has a log of its own.
                    std::fs::remove_file(dir.with_extension("log")).unwrap();
                }
                outcomes
            })
        });
        judges.map(|judge| judge.join().unwrap()).concat()
    });
    for (file, damage, outcome) in &outcomes {
        println!("{outcome:?}: {file} with {damage:?}");
    }
    let count = |wanted| outcomes.iter().filter(|(.., outcome)| *outcome == wanted).count();
    let counts = [Outcome::Served, Outcome::Torn, Outcome::Refused].map(count);
    println!("served, served without the last write, refused: {counts:?}");
    assert!(counts[0] >= 5 && counts[2] >= 25, "{counts:?}");
}
