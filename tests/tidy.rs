//! What keeps the tour true: which room may import which, that every file says what it is, and a few habits that no
//! compiler checks. Each rule is shown to fail on a source that breaks it.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};

/// Each room of `src/` and the rooms that it may import. `server` wires everything and `lib` declares it: both may use
/// all. Tests are exempt.
const ROOMS: &[(&str, &[&str])] = &[
    ("main", &["bench", "cli", "logs", "server"]),
    ("cli", &["bench", "cluster", "config"]),
    ("bench", &[]),
    ("logs", &["config"]),
    ("api", &["channel", "cluster", "command", "kv", "metrics"]),
    ("kv", &["channel", "command", "store"]),
    ("node", &["blocking", "channel", "cluster", "metrics", "transport", "wal"]),
    ("store", &["blocking", "channel", "command", "metrics", "window"]),
    ("transport", &["channel", "cluster", "metrics", "window"]),
    ("wal", &["cluster", "metrics"]),
    ("blocking", &[]),
    ("client", &[]),
    ("fuzzing", &["api", "node", "store", "transport", "wal"]),
    ("channel", &["cluster"]),
    ("config", &["cluster"]),
    ("cluster", &[]),
    ("command", &["channel"]),
    ("metrics", &[]),
    ("window", &[]),
];

const LINES_MAX: usize = 600;

/// Nothing here depends on where packages come from. Written in halves, or this file would name them.
const REGISTRY_HOSTS: &[&str] = &[
    concat!("crates", ".io"),
    concat!("npmjs", ".com"),
    concat!("npmjs", ".org"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("proxy.", "golang.org"),
    concat!("rubygems", ".org"),
];

#[test]
fn rooms_import_only_what_they_may() {
    let faults: Vec<_> = rust_files("src").iter().flat_map(|file| import_faults(&file.path, &file.text)).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// Rooms can be emptied one after the other, each importing only from those already empty.
#[test]
fn the_rooms_have_no_knot() {
    let mut done = BTreeSet::new();
    while done.len() < ROOMS.len() {
        let next = ROOMS.iter().find(|(room, uses)| {
            !done.contains(room) && uses.iter().all(|used| done.contains(used) || *used == "server")
        });
        let left = || ROOMS.iter().map(|(room, _)| room).filter(|room| !done.contains(*room)).collect::<Vec<_>>();
        let (room, _) = next.unwrap_or_else(|| panic!("a knot, or a room that is not in the list: {:?}", left()));
        done.insert(room);
    }
}

#[test]
fn the_import_check_sees_every_way_to_write_an_import() {
    for (path, text, expected) in [
        ("src/store/mod.rs", "use crate::wal::Wal;", &["wal"][..]),
        ("src/store/mod.rs", "use crate::{channel, wal::{disk, record}, node};", &["wal", "node"]),
        ("src/store/mod.rs", "fn f() { crate::wal::open(); }", &["wal"]),
        ("src/store/mod.rs", "fn f() { assert!(::raftkv::wal::open()); }", &["wal"]),
        ("src/store/mod.rs", "use super::wal;", &["wal"]),
        ("src/store/mod.rs", "use super::{channel, wal};", &["wal"]),
        ("src/store/state.rs", "use super::super::wal;", &["wal"]),
        ("src/store/state.rs", "use super::wal;", &[]),
        ("src/store/state.rs", "mod inner { use super::super::wal; use super::super::super::node; }", &["node"]),
        ("src/window.rs", "use super::metrics;", &["metrics"]),
        ("src/window.rs", "use crate::*;", &["*"]),
        ("src/window.rs", "macro_rules! m { () => { $crate::metrics::Metrics::new() } }", &["metrics"]),
        (
            "src/window.rs",
            "//! See [`crate::wal`].\n/// crate::node\nconst WAL: &str = r#\"crate::wal\"#; // crate::wal",
            &[],
        ),
        ("src/window.rs", "#[cfg(test)]\nmod tests { use crate::wal; }", &[]),
        ("src/window.rs", "#[cfg(test)]\nuse crate::{wal};\nuse crate::node;", &["node"]),
        ("src/window.rs", "#[cfg(all(test, unix))]\n#[allow(unused)]\nmod tests { use crate::wal; }", &[]),
        ("src/window.rs", "#[cfg(not(test))]\nuse crate::wal;", &["wal"]),
        ("src/window.rs", "pub(crate) fn f(window: &self::Window) -> std::fmt::Result { Ok(()) }", &[]),
        ("src/main.rs", "use raftkv::{cli, logs, server, wal};", &["wal"]),
        ("src/server.rs", "use crate::wal;", &[]),
        ("src/lib.rs", "pub use crate::wal::Wal;", &[]),
    ] {
        let faults = import_faults(Path::new(path), text);
        assert_eq!(faults.len(), expected.len(), "{path}: {text}\n{faults:?}");
        for (fault, room) in faults.iter().zip(expected) {
            assert!(fault.contains(&format!("imports {room};")), "{path}: {text}\n{fault}");
        }
    }
    let unknown = import_faults(Path::new("src/util.rs"), "");
    assert!(unknown[0].contains("src/util.rs") && unknown[0].contains("no room"), "{unknown:?}");
}

#[test]
fn every_file_says_what_it_is_and_stays_short() {
    let mut faults = Vec::new();
    for file in [rust_files("src"), rust_files("tests"), rust_files("benches")].concat() {
        faults.extend(opening_fault(&file.path, &file.text));
    }
    for file in rust_files("src") {
        faults.extend(length_fault(&file.path, &file.text));
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));

    let path = Path::new("src/x.rs");
    assert!(opening_fault(path, "// no\n").is_some() && opening_fault(path, "//! What it owns.\n").is_none());
    assert!(length_fault(path, &"\n".repeat(601)).is_some() && length_fault(path, &"\n".repeat(600)).is_none());
}

#[test]
fn a_discarded_result_has_its_reason() {
    let files = [rust_files("src"), rust_files("tests"), rust_files("benches")].concat();
    let faults: Vec<_> = files.iter().flat_map(|file| discard_faults(&file.path, &file.text)).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));

    let path = Path::new("src/x.rs");
    assert_eq!(discard_faults(path, "fn f() {\n    g();\n    let _ = g();\n}").len(), 1);
    assert_eq!(discard_faults(path, "fn f() {\n    let _ = g(); // nobody waits\n}").len(), 0);
    assert_eq!(discard_faults(path, "fn f() {\n    // Nobody waits.\n    let _ = g();\n}").len(), 0);
    assert_eq!(discard_faults(path, "const TEXT: &str = \"let _ = g();\";").len(), 0);
}

#[test]
fn no_test_sleeps_but_to_poll_until_a_deadline() {
    let files = [rust_files("src"), rust_files("tests")].concat();
    let faults: Vec<_> = files.iter().flat_map(|file| sleep_faults(&file.path, &file.text)).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));

    let polling = "fn wait() { let deadline = f(); while now() < deadline { sleep(1); } }";
    let asleep = "fn wait() { let deadline = f(); } fn other() { thread::sleep(1); }";
    let in_tests = |text: &str| format!("#[cfg(test)] mod tests {{ {text} }}");
    assert_eq!(sleep_faults(Path::new("tests/x.rs"), asleep).len(), 1);
    assert_eq!(sleep_faults(Path::new("tests/x.rs"), polling).len(), 0);
    assert_eq!(sleep_faults(Path::new("src/x.rs"), asleep).len(), 0, "the product may sleep");
    assert_eq!(sleep_faults(Path::new("src/x.rs"), &in_tests(asleep)).len(), 1);
    assert_eq!(sleep_faults(Path::new("src/x.rs"), &in_tests(polling)).len(), 0);
}

#[test]
fn no_file_names_a_package_registry() {
    let mut files = files_below(Path::new(""), false);
    for directory in [".ci", "benches", "docs", "examples", "fuzz/fuzz_targets", "scripts", "src", "tests"] {
        files.extend(files_below(Path::new(directory), true));
    }
    // Written by cargo, which puts the source of every package there.
    files.retain(|path| path != Path::new("Cargo.lock"));
    assert!(files.len() > 10, "the walk finds files: {files:?}");
    let faults: Vec<_> = files.iter().flat_map(|path| registry_faults(path, &read(path))).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));

    let named = format!("https://static.{}/x", REGISTRY_HOSTS[0]);
    assert_eq!(registry_faults(Path::new("x"), &named).len(), 1);
}

fn import_faults(path: &Path, text: &str) -> Vec<String> {
    let module = module_path(path);
    let room = module.first().map_or("lib", String::as_str);
    if room == "lib" || room == "server" {
        return Vec::new();
    }
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        return vec![format!("{}: no room called {room} is listed in tests/tidy.rs", path.display())];
    };
    let list = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
    imports(text, &module)
        .into_iter()
        .filter(|(used, _)| used != room && !allowed.contains(&used.as_str()))
        .map(|(used, line)| format!("{}:{line} imports {used}; {room} may import {list}", path.display()))
        .collect()
}

/// `src/api/v1/mod.rs` is `[api, v1]`; `src/lib.rs` is empty.
fn module_path(path: &Path) -> Vec<String> {
    let below = path.strip_prefix("src").expect("a path in src").with_extension("");
    let mut module: Vec<_> = below.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    module.pop_if(|last| last == "mod" || last == "lib");
    module
}

/// The rooms that paths in `text` lead to from the root of the crate, with their lines; tests left out.
fn imports(text: &str, module: &[String]) -> Vec<(String, usize)> {
    let tokens = tokens(text);
    let tests = test_ranges(&tokens);
    let mut found = Vec::new();
    // The modules around the token: the file's, then inline ones with the token that closes each.
    let mut module = module.to_vec();
    let mut inline = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        if inline.last() == Some(&at) {
            inline.pop();
            module.pop();
        }
        if tests.iter().any(|range| range.contains(&at)) {
            continue;
        }
        let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
        if token.text == "mod" && text(at + 2) == "{" {
            inline.push(closing(&tokens, at + 2));
            module.push(text(at + 1).to_owned());
        }
        let mut next = at + 1;
        let mut base = match token.text.as_str() {
            "crate" | "raftkv" => Vec::new(),
            "super" if at == 0 || text(at - 1) != "::" => {
                let mut base = module.clone();
                base.pop();
                while text(next) == "::" && text(next + 1) == "super" {
                    base.pop();
                    next += 2;
                }
                base
            }
            _ => continue,
        };
        if text(next) != "::" {
            continue;
        }
        if let Some(room) = base.drain(..).next() {
            found.push((room, token.line));
        } else if text(next + 1) == "{" {
            let names = group_heads(&tokens, next + 1);
            found.extend(names.into_iter().map(|at| (tokens[at].text.clone(), tokens[at].line)));
        } else {
            found.push((text(next + 1).to_owned(), token.line));
        }
    }
    found
}

/// The first token of each part of a `{a::b, c}` that opens at `open`.
fn group_heads(tokens: &[Token], open: usize) -> Vec<usize> {
    let mut heads = Vec::new();
    let mut at = open + 1;
    let mut head = true;
    while at < closing(tokens, open) {
        if head {
            heads.push(at);
        }
        head = tokens[at].text == ",";
        at = if tokens[at].text == "{" { closing(tokens, at) } else { at + 1 };
    }
    heads
}

fn opening_fault(path: &Path, text: &str) -> Option<String> {
    let fault = format!("{}: does not open with //! and what it owns", path.display());
    (!text.starts_with("//! ")).then_some(fault)
}

fn length_fault(path: &Path, text: &str) -> Option<String> {
    let lines = text.lines().count();
    (lines > LINES_MAX).then(|| format!("{}: {lines} lines, of {LINES_MAX}: more than one subject?", path.display()))
}

fn discard_faults(path: &Path, text: &str) -> Vec<String> {
    let lines: Vec<_> = text.lines().collect();
    let tokens = tokens(text);
    let discards = tokens.windows(3).filter(|at| at[0].text == "let" && at[1].text == "_" && at[2].text == "=");
    discards
        .map(|at| at[0].line)
        .filter(|line| !lines[line - 1].contains("//") && (*line == 1 || !lines[line - 2].trim().starts_with("//")))
        .map(|line| format!("{}:{line} discards a result without a comment that says why", path.display()))
        .collect()
}

fn sleep_faults(path: &Path, text: &str) -> Vec<String> {
    // Its clock is the world's: who sleeps there takes no time.
    if path.starts_with("tests/simulation") {
        return Vec::new();
    }
    let tokens = tokens(text);
    let whole = 0..tokens.len();
    let tests = if path.starts_with("tests") { vec![whole] } else { test_ranges(&tokens) };
    let bodies: Vec<_> = (0..tokens.len()).filter(|at| tokens[*at].text == "fn").map(|at| item(&tokens, at)).collect();
    let polls = |at: usize| {
        let innermost = bodies.iter().filter(|body| body.contains(&at)).min_by_key(|body| body.len());
        innermost.is_some_and(|body| tokens[body.clone()].iter().any(|token| token.text.contains("deadline")))
    };
    (0..tokens.len())
        .filter(|at| tokens[*at].text == "sleep" && tests.iter().any(|range| range.contains(at)) && !polls(*at))
        .map(|at| {
            let line = tokens[at].line;
            format!("{}:{line} sleeps: poll for what you wait for, in a function with a deadline", path.display())
        })
        .collect()
}

fn registry_faults(path: &Path, text: &str) -> Vec<String> {
    let hosts = REGISTRY_HOSTS.iter().filter(|host| text.contains(**host));
    hosts.map(|host| format!("{}: names the package registry {host}", path.display())).collect()
}

/// One token of Rust, with comments gone and literals blank.
#[derive(Debug)]
struct Token {
    text: String,
    line: usize,
}

fn tokens(text: &str) -> Vec<Token> {
    fn flatten(stream: TokenStream, flat: &mut Vec<Token>) {
        let mut joint = false;
        for tree in stream {
            let line = tree.span().start().line;
            let colon = matches!(&tree, TokenTree::Punct(sign) if sign.as_char() == ':');
            match tree {
                TokenTree::Group(group) => {
                    let (open, close) = match group.delimiter() {
                        Delimiter::Brace => ("{", "}"),
                        Delimiter::Bracket => ("[", "]"),
                        Delimiter::Parenthesis => ("(", ")"),
                        Delimiter::None => ("", ""),
                    };
                    flat.push(Token { text: open.to_owned(), line });
                    flatten(group.stream(), flat);
                    flat.push(Token { text: close.to_owned(), line: group.span_close().start().line });
                    joint = false;
                }
                TokenTree::Punct(_) if joint && colon => {
                    flat.last_mut().expect("the first colon").text.push(':');
                    joint = false;
                }
                TokenTree::Punct(sign) => {
                    joint = colon && sign.spacing() == Spacing::Joint;
                    flat.push(Token { text: sign.as_char().to_string(), line });
                }
                TokenTree::Ident(word) => flat.push(Token { text: word.to_string(), line }),
                TokenTree::Literal(_) => flat.push(Token { text: "literal".to_owned(), line }),
            }
        }
    }
    let mut flat = Vec::new();
    flatten(text.parse().expect("Rust that compiles"), &mut flat);
    flat
}

/// The token that closes the group that opens at `open`.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "{" | "[" | "(" => depth += 1,
            "}" | "]" | ")" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    panic!("no end of the group at line {}", tokens[open].line)
}

/// The item that starts at `start`: up to its semicolon or the end of its braces.
fn item(tokens: &[Token], start: usize) -> Range<usize> {
    let mut at = start;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            ";" => return start..at + 1,
            "{" => return start..closing(tokens, at) + 1,
            "[" | "(" => at = closing(tokens, at) + 1,
            _ => at += 1,
        }
    }
    start..at
}

/// The items that exist in tests only: behind `#[cfg(test)]` or `#[cfg(all(test, …))]`.
fn test_ranges(tokens: &[Token]) -> Vec<Range<usize>> {
    let is = |at: usize, words: &[&str]| {
        let found = tokens[at..].iter().map(|token| token.text.as_str());
        found.take(words.len()).eq(words.iter().copied())
    };
    let starts = (0..tokens.len()).filter(|at| {
        is(*at, &["#", "[", "cfg", "(", "test", ")"]) || is(*at, &["#", "[", "cfg", "(", "all", "(", "test"])
    });
    starts.map(|at| item(tokens, at)).collect()
}

#[derive(Debug, Clone)]
struct File {
    /// From the root of the package.
    path: PathBuf,
    text: String,
}

/// The sources below a directory; of `src/`, those that ship.
fn rust_files(directory: &str) -> Vec<File> {
    let is_test = |path: &Path| {
        directory == "src"
            && path.components().any(|part| ["tests", "tests.rs"].map(AsRef::as_ref).contains(&part.as_os_str()))
    };
    let mut paths = files_below(Path::new(directory), true);
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs") && !is_test(path));
    assert!(!paths.is_empty(), "no files in {directory}");
    paths.into_iter().map(|path| File { text: read(&path), path }).collect()
}

/// The files in `directory` of the package, those of its subdirectories too if `deep`; none if it does not exist.
fn files_below(directory: &Path, deep: bool) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    if !root.join(directory).exists() {
        return files;
    }
    for entry in fs::read_dir(root.join(directory)).expect("read a directory of the package") {
        let entry = entry.expect("read a directory of the package");
        let path = directory.join(entry.file_name());
        let kind = entry.file_type().expect("the kind of a file");
        if kind.is_file() {
            files.push(path);
        } else if deep && kind.is_dir() {
            files.extend(files_below(&path, deep));
        }
    }
    files.sort();
    files
}

fn read(path: &Path) -> String {
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("read a file of the package");
    String::from_utf8_lossy(&bytes).into_owned()
}
