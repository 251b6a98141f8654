//! Every version reads what every earlier one wrote. Directories that earlier versions made are kept in
//! `tests/formats/<version>/<story>/`: a manifest of what they hold, and the files of each member as text. The present
//! program opens all of them. A format that it writes and that no kept directory has is told; then, and before a release,
//!
//! ```text
//! RECORD_FORMATS=v0.2 cargo test --test cluster formats::
//! ```
//!
//! makes those of the present version. What was released is never made again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::harness::{Node, free_port, request, wait_for};
use crate::kept::{Content, Directory};

/// Addresses are in the log, so members of a kept cluster listen where they did. Nobody else is on these.
const FOUNDERS: &str = "http://127.0.1.1:7021,http://127.0.1.2:7021,http://127.0.1.3:7021,http://127.0.1.4:7021";
const LONE: &str = "http://127.0.1.1:7021";
/// The member of the cluster that was removed.
const REMOVED: u64 = 4;
const SMALL: &[&str] = &["--snapshot-count=12", "--snapshot-catchup-entries=4", "--max-value-bytes=4MiB"];
const LARGE: &[&str] = &["--snapshot-count=1000", "--snapshot-log-bytes=1GiB", "--max-value-bytes=4MiB"];

/// What a kept directory, or those of a cluster, hold.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// What the members were started with.
    cluster: String,
    members: Vec<u64>,
    removed: Vec<u64>,
    values: BTreeMap<String, Value>,
    term: u64,
    applied: u64,
    revision: u64,
    state_hash: String,
    segments: u64,
    /// Index of the newest snapshot, and where the log begins.
    snapshot: u64,
    log_from: u64,
}

/// Large values are zeros, so that they take no room here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Zeros(usize),
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Value::Text(text) => text.clone().into_bytes(),
            Value::Zeros(len) => vec![0; *len],
        }
    }
}

/// One story of one version.
struct Kept {
    dir: PathBuf,
    manifest: Manifest,
}

impl Kept {
    fn read(dir: PathBuf) -> Self {
        let manifest = fs::read(dir.join("manifest.json")).unwrap();
        Kept { manifest: serde_json::from_slice(&manifest).unwrap(), dir }
    }

    fn directory(&self, id: u64) -> Directory {
        Directory::from_text(&fs::read_to_string(self.dir.join(format!("{id}.hex"))).unwrap())
    }

    /// A member with its directory, which is written anew; not started.
    fn member(&self, id: u64, root: &Path) -> Node {
        let dir = root.join(id.to_string());
        self.directory(id).write(&dir);
        let mut node = Node::at(id, &self.manifest.cluster, &dir, SMALL);
        if self.manifest.members.len() == 1 {
            // Nobody dials a lone member.
            node.set_flags(&[SMALL, &["--listen-peer", &format!("127.0.0.1:{}", free_port())]].concat());
        }
        node
    }

    /// The member serves what the manifest says, and nothing else.
    fn must_serve(&self, node: &Node) {
        let story = format!("{} of {}\n{}", node.id, self.dir.display(), node.log());
        let Manifest { values, term, applied, revision, state_hash, members, .. } = &self.manifest;
        for (key, value) in values {
            assert!(node.must_get(key) == value.bytes(), "{key} at {story}");
        }
        assert_eq!(node.get("no-such-key").unwrap().status, 404, "{story}");
        let status = node.status().unwrap();
        assert_eq!(status["state_hash"], **state_hash, "{story}");
        assert_eq!((&status["revision"], &status["keys"]), (&(*revision).into(), &values.len().into()), "{story}");
        assert_eq!(&ids(&status), members, "{story}");
        // Of those who led since then, each began with an entry; alone, one did.
        let (now, terms) = (&status["applied"], status["term"].as_u64().unwrap() - term);
        let expected = if members.len() == 1 { 1..2 } else { 1..10 };
        assert!(expected.contains(&(now.as_u64().unwrap() - applied)) && terms >= 1, "{applied}, now {now}: {story}");
    }
}

fn ids(status: &serde_json::Value) -> Vec<u64> {
    let mut ids: Vec<u64> =
        status["members"].as_array().unwrap().iter().map(|member| member["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    ids
}

fn formats() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats")
}

/// All that is kept, oldest version first.
fn kept() -> Vec<Kept> {
    let below = |dir: &Path| {
        let mut dirs: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        dirs.sort();
        dirs
    };
    below(&formats()).iter().flat_map(|version| below(version)).map(Kept::read).collect()
}

/// Held while the members of a kept cluster run: their addresses are the same for everybody on this machine.
fn addresses() -> File {
    let lock = File::create(std::env::temp_dir().join("raftkv-test-addresses.lock")).unwrap();
    lock.lock().unwrap();
    lock
}

#[test]
fn every_kept_directory_is_read_exactly() {
    if let Ok(version) = std::env::var("RECORD_FORMATS") {
        record(&formats().join(version));
    }
    let kept = kept();
    let stories: BTreeSet<_> = kept.iter().map(|kept| kept.dir.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(Vec::from_iter(stories), ["cluster", "segments", "snapshot"]);
    for kept in kept {
        println!("{}", kept.dir.display());
        let root = tempfile::tempdir().unwrap();
        let _held = addresses();
        let mut nodes: Vec<Node> = kept.manifest.members.iter().map(|id| kept.member(*id, root.path())).collect();
        nodes.iter_mut().for_each(Node::start);
        nodes.iter().for_each(Node::wait_ready);
        nodes.iter().for_each(|node| kept.must_serve(node));
        for id in &kept.manifest.removed {
            let mut removed = kept.member(*id, root.path());
            removed.start();
            assert_eq!(removed.wait().code(), Some(0), "{}", removed.log());
            assert!(removed.log().contains("was removed from the cluster"), "{}", removed.log());
            let again = nodes[0].add(*id, "http://127.0.1.4:7021");
            assert_eq!((again.status, again.text().contains("never used again")), (409, true), "{}", again.text());
        }
        // Written by both versions, and read again.
        nodes[0].must_put("new", "of the present version");
        nodes.iter_mut().for_each(|node| assert_eq!(node.stop(), Some(0), "{}", node.log()));
        nodes.iter_mut().for_each(Node::start);
        nodes.iter().for_each(Node::wait_ready);
        for node in &nodes {
            assert_eq!(node.must_get("new"), b"of the present version");
            kept.manifest.values.iter().for_each(|(key, value)| assert!(node.must_get(key) == value.bytes(), "{key}"));
        }
    }
}

/// Makes the directories of the present version.
fn record(version: &Path) {
    assert!(!version.exists(), "{} is there: what was released is never made again", version.display());
    let root = tempfile::tempdir().unwrap();
    record_lone(&root.path().join("segments"), &version.join("segments"), LARGE, 7);
    record_lone(&root.path().join("snapshot"), &version.join("snapshot"), SMALL, 1);
    record_cluster(root.path(), &version.join("cluster"));
}

/// One member with so many large values among small ones, some of them written twice.
fn record_lone(dir: &Path, to: &Path, flags: &[&str], large: usize) {
    let mut node = Node::at(1, LONE, dir, flags);
    node.set_flags(&[flags, &["--listen-peer", &format!("127.0.0.1:{}", free_port())]].concat());
    node.start();
    node.wait_ready();
    let mut values = BTreeMap::new();
    for n in 0..30 {
        put(&node, &mut values, format!("key-{}", n % 10), Value::Text(format!("value {n}")));
    }
    for n in 0..large {
        put(&node, &mut values, "large".to_owned(), Value::Zeros((4 << 20) - n));
    }
    for key in ["empty", "%C3%A9%00%2Fkey"] {
        put(&node, &mut values, key.to_owned(), Value::Text(String::new()));
    }
    values.extend(put_at_once(&node));
    finish(&mut [node], LONE, flags, Vec::new(), values, to);
}

/// Four members, of which one is removed; its directory is kept too.
fn record_cluster(root: &Path, to: &Path) {
    let _held = addresses();
    let mut nodes: Vec<Node> =
        (1..=4).map(|id| Node::at(id, FOUNDERS, &root.join(format!("member-{id}")), SMALL)).collect();
    nodes.iter_mut().for_each(Node::start);
    nodes.iter().for_each(Node::wait_ready);
    let mut values = BTreeMap::new();
    for n in 0..40 {
        put(&nodes[n % 3], &mut values, format!("key-{}", n % 10), Value::Text(format!("value {n}")));
        if n == 10 {
            nodes[0].must_remove(REMOVED);
            assert_eq!(nodes[3].wait().code(), Some(0), "{}", nodes[3].log());
        }
    }
    finish(&mut nodes, FOUNDERS, SMALL, vec![REMOVED], values, to);
}

fn put(node: &Node, values: &mut BTreeMap<String, Value>, key: String, value: Value) {
    node.must_put(&key, value.bytes());
    values.insert(key, value);
}

/// Puts some keys, all at once and over and over, until some of them shared an entry.
fn put_at_once(node: &Node) -> BTreeMap<String, Value> {
    let values: BTreeMap<_, _> = (0..16).map(|n| (format!("at-once-{n}"), Value::Text(format!("value {n}")))).collect();
    wait_for("writes share an entry", || {
        let before = node.status()?;
        std::thread::scope(|scope| {
            values.iter().for_each(|(key, value)| drop(scope.spawn(|| node.must_put(key, value.bytes()))));
        });
        let after = node.status()?;
        let more = |field: &str| after[field].as_u64().unwrap() - before[field].as_u64().unwrap();
        (more("applied") < more("revision")).then_some(())
    });
    values
}

/// Stops the members once they agree and have taken their snapshots, and keeps what they leave.
fn finish(
    nodes: &mut [Node],
    cluster: &str,
    flags: &[&str],
    removed: Vec<u64>,
    values: BTreeMap<String, Value>,
    to: &Path,
) {
    let running: Vec<&Node> = nodes.iter().filter(|node| !removed.contains(&node.id)).collect();
    let status = wait_for("they agree, and have their snapshots", || {
        let all: Vec<_> = running.iter().map(|node| node.status()).collect::<Option<_>>()?;
        let due = |status: &serde_json::Value| {
            let taken = flags == LARGE || status["snapshot"]["index"].as_u64() > Some(20);
            taken && status["state_hash"] == all[0]["state_hash"] && status["applied"] == all[0]["applied"]
        };
        all.iter().all(due).then(|| all[0].clone())
    });
    let number = |field: &str| status.pointer(field).unwrap().as_u64().unwrap();
    let manifest = Manifest {
        cluster: cluster.to_owned(),
        members: ids(&status),
        removed,
        values,
        term: number("/term"),
        applied: number("/applied"),
        revision: number("/revision"),
        state_hash: status["state_hash"].as_str().unwrap().to_owned(),
        segments: number("/wal/segments"),
        snapshot: number("/snapshot/index"),
        log_from: number("/snapshot/log_from"),
    };
    fs::create_dir_all(to).unwrap();
    for node in nodes {
        if node.is_running() {
            assert_eq!(node.stop(), Some(0), "{}", node.log());
        }
        fs::write(to.join(format!("{}.hex", node.id)), Directory::read(&node.dir).to_text()).unwrap();
    }
    fs::write(to.join("manifest.json"), serde_json::to_string_pretty(&manifest).unwrap() + "\n").unwrap();
}

/// The formats that the files of a directory have, each with its number. The places are those of `docs/formats.md`.
fn versions(directory: &Directory) -> BTreeSet<(&'static str, u32)> {
    let mut versions = BTreeSet::new();
    for (name, content) in &directory.files {
        let bytes = content.bytes();
        if name == "identity" {
            let title = std::str::from_utf8(&bytes).unwrap().lines().next().unwrap();
            versions.insert(("identity", title.strip_prefix("raftkv identity, format ").unwrap().parse().unwrap()));
        } else if name.ends_with(".wal") {
            versions.insert(("segment", u32_at(&bytes, 8)));
            for entry in entries(&bytes) {
                versions.insert(("entry", bytes[entry + 16].into()));
                versions.insert(("command", bytes[command(&bytes, entry)].into()));
            }
        } else if name.ends_with(".snap") {
            versions.insert(("snapshot", u32_at(&bytes, 8)));
            versions.insert(("image of the store", bytes[image_at(&bytes)].into()));
        }
    }
    versions
}

/// Where entries with commands are in a segment: those that are the first record of their frame.
fn entries(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let mut at = 4096;
    std::iter::from_fn(move || {
        let frame = at;
        let len = bytes.get(frame..frame + 16).map_or(0, |_| u32_at(bytes, frame) as usize);
        at = (frame + 16 + len).next_multiple_of(8);
        (len > 0).then_some(frame + 16)
    })
    .filter(|record| bytes[*record] == 2)
    .map(|record| record + 5)
    .filter(|entry| [0, 3].contains(&bytes[entry + 16]) && u32_at(bytes, entry + 21) > 0)
}

/// Where an entry's first command is.
fn command(bytes: &[u8], entry: usize) -> usize {
    entry + 25 + u32_at(bytes, entry + 17) as usize
}

/// Where the image in a snapshot begins, in its first block.
fn image_at(bytes: &[u8]) -> usize {
    28 + u32_at(bytes, 20) as usize + 8
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn every_format_that_this_version_writes_is_kept() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("http://127.0.0.1:{}", free_port());
    let mut node = Node::at(1, &url, &root.path().join("data"), &["--snapshot-count=2"]);
    node.start();
    node.wait_ready();
    (0..4).for_each(|n| node.must_put("key", n.to_string()));
    put_at_once(&node);
    wait_for("a snapshot", || (node.status()?["snapshot"]["index"].as_u64()? > 0).then_some(()));
    node.kill();
    let written = versions(&Directory::read(&node.dir));
    let kinds: Vec<&str> = written.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, ["command", "entry", "entry", "identity", "image of the store", "segment", "snapshot"]);
    let members = |kept: &Kept| kept.manifest.members.clone();
    let kept: BTreeSet<_> = kept()
        .iter()
        .flat_map(|kept| members(kept).into_iter().map(|id| versions(&kept.directory(id))))
        .flatten()
        .collect();
    let missing: Vec<_> = written.difference(&kept).collect();
    assert!(
        missing.is_empty(),
        "{missing:?} are in no kept directory: record this version, as said in this file's head"
    );
}

/// The kept directories are what they are kept for.
#[test]
fn there_are_segments_a_snapshot_and_a_compacted_log() {
    for Kept { dir, manifest } in kept() {
        let files = Kept::read(dir.clone()).directory(1).files;
        let count = |suffix: &str| files.keys().filter(|name| name.ends_with(suffix)).count();
        let story = dir.file_name().unwrap().to_str().unwrap();
        assert_eq!(count(".wal") as u64, manifest.segments, "{}", dir.display());
        match story {
            "segments" => assert!(count(".wal") == 3 && count(".snap") == 0 && manifest.log_from == 2, "{manifest:?}"),
            _ => assert!(count(".snap") > 0 && manifest.snapshot > 20 && manifest.log_from > 10, "{manifest:?}"),
        }
        assert_eq!(manifest.removed.is_empty(), story != "cluster", "{manifest:?}");
    }
}

/// Starts from a kept directory that was changed in one file; what it said last.
fn refusal(file: &str, change: impl FnOnce(&mut Vec<u8>)) -> String {
    let root = tempfile::tempdir().unwrap();
    let kept = kept().into_iter().find(|kept| kept.dir.ends_with("snapshot")).unwrap();
    let mut node = kept.member(1, root.path());
    let mut directory = kept.directory(1);
    let name = directory.files.keys().rfind(|name| name.contains(file)).unwrap().clone();
    let mut bytes = directory.files[&name].bytes();
    change(&mut bytes);
    directory.files.insert(name.clone(), Content::of(&bytes));
    directory.write(&node.dir);
    node.start();
    assert_eq!(node.wait().code(), Some(1), "{}", node.log());
    assert!(request("GET", node.port, "/key-1", b"").is_err());
    let log = node.log();
    let complaint = log.lines().last().unwrap();
    assert!(complaint.starts_with("raftkv: ") && complaint.contains("newer version"), "{complaint}");
    complaint.replace(&name, "the file")
}

fn put_crc(bytes: &mut [u8], at: usize, crc: u32) {
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_newer_format_of_each_kind_of_file_is_refused_as_such() {
    let told = refusal("identity", |bytes| {
        let lines = "raftkv identity, format 2\nsomething else\n";
        *bytes = format!("{lines}crc32c {:08x}\n", crc32c::crc32c(lines.as_bytes())).into_bytes();
    });
    assert!(told.contains("the file was written by a newer version (format 2)"), "{told}");

    let told = refusal(".wal", |bytes| {
        bytes[8] = 2;
        let crc = crc32c::crc32c(&bytes[..40]);
        put_crc(bytes, 40, crc);
    });
    assert!(told.contains("the file was written by a newer version (format 2)"), "{told}");

    let told = refusal(".snap", |bytes| {
        bytes[8] = 2;
        let meta = 28..image_at(bytes) - 8;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..24]), &bytes[meta]);
        put_crc(bytes, 24, crc);
    });
    assert!(told.contains("the file was written by a newer version (format 2)"), "{told}");

    let told = refusal(".snap", |bytes| {
        let image = image_at(bytes);
        bytes[image] = 2;
        seal_blocks(bytes, image - 8);
    });
    assert!(told.contains("a state of format 2") && !told.contains("remove"), "{told}");

    let told = refusal(".wal", |bytes| {
        let command = command(bytes, entries(bytes).last().unwrap());
        bytes[command] = 2;
        seal_frame_of(bytes, command);
    });
    assert!(told.contains("a command of format 2"), "{told}");
}

/// Makes the checksums of a snapshot's blocks, from the first at `at`, right again.
fn seal_blocks(bytes: &mut [u8], mut at: usize) {
    let salt = bytes[12..20].to_vec();
    let mut image_crc = 0;
    for number in 0u64.. {
        let len = u32_at(bytes, at) as usize;
        let end = at + 8 + if len == 0 { 12 } else { len };
        if len == 0 {
            put_crc(bytes, end - 4, image_crc);
        } else {
            image_crc = crc32c::crc32c_append(image_crc, &bytes[at + 8..end]);
        }
        let head = [&salt[..], &number.to_le_bytes(), &(len as u32).to_le_bytes()].concat();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head), &bytes[at + 8..end]);
        put_crc(bytes, at + 4, crc);
        at = end;
        if len == 0 {
            break;
        }
    }
}

/// Makes the checksum of the frame that `place` is in right again.
fn seal_frame_of(bytes: &mut [u8], place: usize) {
    let mut at = 4096;
    loop {
        let len = u32_at(bytes, at) as usize;
        if place < at + 16 + len {
            let head = [&bytes[16..32], &bytes[at + 8..at + 16], &bytes[at..at + 4]].concat();
            let crc = crc32c::crc32c_append(crc32c::crc32c(&head), &bytes[at + 16..at + 16 + len]);
            return put_crc(bytes, at + 4, crc);
        }
        at = (at + 16 + len).next_multiple_of(8);
    }
}
