//! A data directory as a value: read from the disk, written to it again with its holes, and kept in the repository as
//! text that leaves out the zeros. Used by `formats`, which keeps directories, and by `damage`, which copies them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Zeros are looked for in blocks of this size first: nearly all of a segment is zeros.
const BLOCK_BYTES: usize = 4096;
/// What one line of text shows.
const LINE_BYTES: usize = 32;

/// One file: its size, and those of its lines that are not zeros, by their offset.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Content {
    pub size_bytes: u64,
    pub lines: BTreeMap<u64, Vec<u8>>,
}

/// The files of a directory by their paths in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Directory {
    pub files: BTreeMap<String, Content>,
}

impl Content {
    pub fn of(bytes: &[u8]) -> Self {
        let mut lines = BTreeMap::new();
        for (nth, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
            if *block == [0; BLOCK_BYTES][..block.len()] {
                continue;
            }
            for (at, line) in block.chunks(LINE_BYTES).enumerate().filter(|(_, line)| line.iter().any(|b| *b != 0)) {
                lines.insert((nth * BLOCK_BYTES + at * LINE_BYTES) as u64, line.to_vec());
            }
        }
        Content { size_bytes: bytes.len() as u64, lines }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size_bytes as usize];
        for (at, line) in &self.lines {
            bytes[*at as usize..][..line.len()].copy_from_slice(line);
        }
        bytes
    }

    /// How far it is not zeros.
    pub fn used_bytes(&self) -> u64 {
        let last = self.lines.last_key_value();
        let used = |line: &Vec<u8>| line.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        last.map_or(0, |(at, line)| at + used(line))
    }
}

impl Directory {
    pub fn read(dir: &Path) -> Self {
        let mut directory = Directory::default();
        directory.read_below(dir, dir);
        directory
    }

    fn read_below(&mut self, root: &Path, dir: &Path) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                self.read_below(root, &path);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                self.files.insert(name, Content::of(&fs::read(&path).unwrap()));
            }
        }
    }

    /// Makes the directory; what was there is gone.
    pub fn write(&self, dir: &Path) {
        if dir.exists() {
            fs::remove_dir_all(dir).unwrap();
        }
        for (name, content) in &self.files {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let file = File::create(&path).unwrap();
            file.set_len(content.size_bytes).unwrap();
            for (at, line) in &content.lines {
                file.write_all_at(line, *at).unwrap();
            }
        }
    }

    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for (name, content) in &self.files {
            text += &format!("file {name} {}\n", content.size_bytes);
            for (at, line) in &content.lines {
                let hex: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
                text += &format!("{at:08x} {hex}\n");
            }
        }
        text
    }

    pub fn from_text(text: &str) -> Self {
        let mut directory = Directory::default();
        let mut name = String::new();
        for line in text.lines() {
            if let Some(file) = line.strip_prefix("file ") {
                let (path, size_bytes) = file.split_once(' ').unwrap();
                name = path.to_owned();
                let content = Content { size_bytes: size_bytes.parse().unwrap(), lines: BTreeMap::new() };
                directory.files.insert(name.clone(), content);
            } else {
                let (at, hex) = line.split_once(' ').unwrap();
                let byte = |nth: usize| u8::from_str_radix(&hex[2 * nth..2 * nth + 2], 16).unwrap();
                let line = (0..hex.len() / 2).map(byte).collect();
                let file = directory.files.get_mut(&name).unwrap();
                file.lines.insert(u64::from_str_radix(at, 16).unwrap(), line);
            }
        }
        directory
    }
}

#[test]
fn a_directory_comes_back_from_its_text() {
    let mut bytes = vec![0; 3 * BLOCK_BYTES + 7];
    (bytes[5], bytes[BLOCK_BYTES + 100], bytes[3 * BLOCK_BYTES + 6]) = (1, 2, 3);
    let mut directory = Directory::default();
    directory.files.insert("LOCK".to_owned(), Content::of(b""));
    directory.files.insert("wal/x".to_owned(), Content::of(&bytes));
    assert_eq!(directory.files["wal/x"].used_bytes(), bytes.len() as u64);
    let again = Directory::from_text(&directory.to_text());
    assert_eq!(again, directory);
    let root = tempfile::tempdir().unwrap();
    again.write(&root.path().join("data"));
    assert_eq!(fs::read(root.path().join("data/wal/x")).unwrap(), bytes);
    assert_eq!(Directory::read(&root.path().join("data")), directory);
}
