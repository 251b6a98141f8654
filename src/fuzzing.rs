//! What the fuzzer runs, one function a target: any bytes go in, and a panic is a finding. The properties stand beside
//! the code that they are about, in each room's `fuzzing`. Called by `fuzz/fuzz_targets`, and by the test below, which
//! replays `fuzz/corpus` and `fuzz/regressions`, so that what was found once stays found without a fuzzer. Neither is
//! in a binary that ships.

use crate::{api, node, store, transport, wal};

/// Frames of the log, and whole segments.
pub fn wal_frame(bytes: &[u8]) {
    wal::fuzzing::frame(bytes);
}

/// Damaged directories of segments.
pub fn wal_recover(bytes: &[u8]) {
    wal::fuzzing::recover(bytes);
}

/// Frames between peers, and the headers of their handshakes.
pub fn transport_frame(bytes: &[u8]) {
    transport::fuzzing::frame(bytes);
    transport::fuzzing::handshake(bytes);
}

/// A node in some state, and any messages of its peers.
pub fn admit_step(bytes: &[u8]) {
    node::fuzzing::admit_step(bytes);
}

/// Snapshot files, and the images of the state in them.
pub fn snapshot_file(bytes: &[u8]) {
    wal::fuzzing::snapshot(bytes);
    store::fuzzing::state_image(bytes);
    node::fuzzing::start_from_meta(bytes);
}

/// Targets of requests: paths, keys, queries.
pub fn http_target(bytes: &[u8]) {
    api::fuzzing::target(bytes);
}

/// Bodies of requests: member's addresses, and commands as they come to the store.
pub fn api_body(bytes: &[u8]) {
    api::fuzzing::addresses_body(bytes);
    store::fuzzing::command(bytes);
}

/// What members forward to the leader and tell a joiner.
pub fn propose_body(bytes: &[u8]) {
    transport::fuzzing::proposals(bytes);
    node::fuzzing::foreign_change(bytes);
}

#[cfg(test)]
mod tests {
    //! Whatever the fuzzer found, and the corpus that it starts from, passes on every run of the tests.

    use std::fs;
    use std::path::{Path, PathBuf};

    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 8] = [
        ("admit_step", admit_step),
        ("api_body", api_body),
        ("http_target", http_target),
        ("propose_body", propose_body),
        ("snapshot_file", snapshot_file),
        ("transport_frame", transport_frame),
        ("wal_frame", wal_frame),
        ("wal_recover", wal_recover),
    ];

    fn fuzz_dir(below: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(below)
    }

    /// The files of a directory, in the order of their names; none where it is missing.
    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    /// The name of an input that panics is the last line above the panic's own.
    fn replay((name, target): Target) {
        let corpus = files(&fuzz_dir("corpus").join(name));
        assert!(!corpus.is_empty(), "no corpus for {name}");
        for path in corpus.iter().chain(&files(&fuzz_dir("regressions").join(name))) {
            eprintln!("{}", path.display());
            target(&fs::read(path).unwrap());
        }
    }

    #[test]
    fn the_corpus_of_each_target_passes() {
        TARGETS.into_iter().for_each(replay);
    }

    /// Writes what the encoders make into the corpus: `RAFTKV_RECORD_CORPUS=1 cargo test --lib fuzzing`. The names are
    /// hashes, as the fuzzer's own: the same seed is written once.
    #[test]
    fn the_seeds_are_recorded_when_asked_for() {
        let [admit_step, metas, changes] = node::fuzzing::seeds();
        let [wal_frame, wal_recover, files] = wal::fuzzing::seeds();
        let [commands, images] = store::fuzzing::seeds();
        let [frames, proposals, headers] = transport::fuzzing::seeds();
        let [http_target, addresses] = api::fuzzing::seeds();
        let seeds = [
            ("admit_step", admit_step),
            ("api_body", [addresses, commands].concat()),
            ("http_target", http_target),
            ("propose_body", [proposals, changes].concat()),
            ("snapshot_file", [files, images, metas].concat()),
            ("transport_frame", [frames, headers].concat()),
            ("wal_frame", wal_frame),
            ("wal_recover", wal_recover),
        ];
        for ((name, target), (recorded, seeds)) in TARGETS.into_iter().zip(seeds) {
            assert_eq!(name, recorded);
            for seed in seeds {
                target(&seed);
                if std::env::var_os("RAFTKV_RECORD_CORPUS").is_some() {
                    let dir = fuzz_dir("corpus").join(name);
                    fs::create_dir_all(&dir).unwrap();
                    fs::write(dir.join(format!("{:016x}", xxh3_64(&seed))), &seed).unwrap();
                }
            }
        }
    }

    /// A target that is only here is never fuzzed; one that is only there is never replayed.
    #[test]
    fn the_fuzzer_has_the_same_targets() {
        let names: Vec<String> = files(&fuzz_dir("fuzz_targets"))
            .iter()
            .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, TARGETS.map(|(name, _)| name));
        let manifest = fs::read_to_string(fuzz_dir("Cargo.toml")).unwrap();
        for name in names {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
            let text = fs::read_to_string(fuzz_dir("fuzz_targets").join(format!("{name}.rs"))).unwrap();
            assert!(text.contains(&format!("raftkv::fuzzing::{name}(bytes)")), "{name} runs another target");
        }
    }
}
