//! The program as a person meets it before a server runs: what it prints, where, and the exit code. None of these
//! starts one.

use std::io;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// What ran, in an empty directory and an environment that holds `variables` alone of ours.
fn run(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let directory = TempDir::new().expect("a temporary directory");
    let output = command(args, variables, &directory).output().expect("run raftkv");
    let left = directory.path().read_dir().expect("read the directory").count();
    assert_eq!(left, 0, "{args:?} left something behind");
    output
}

fn command(args: &[&str], variables: &[(&str, &str)], directory: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_raftkv"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RAFTKV_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    command.args(args).envs(variables.iter().copied()).current_dir(directory.path()).stdin(Stdio::null());
    command
}

/// The line that a refused start writes, after the program's name: one line, on stderr, exit 2.
fn refusal(args: &[&str], variables: &[(&str, &str)]) -> String {
    let output = run(args, variables);
    let stderr = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(2), "{args:?} {variables:?}: {stderr}");
    assert_eq!(output.stdout, b"", "{args:?} {variables:?}");
    let line = stderr.strip_suffix('\n').and_then(|line| line.strip_prefix("raftkv: "));
    let line = line.unwrap_or_else(|| panic!("{args:?} {variables:?}: {stderr:?}"));
    assert!(!line.contains('\n'), "{stderr}");
    line.to_owned()
}

#[test]
fn help_and_version_go_to_stdout() {
    for flag in ["--help", "-h", "-help"] {
        let output = run(&[flag], &[]);
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{flag}");
        let text = String::from_utf8(output.stdout).expect("text");
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in ["--election-ticks", "RAFTKV_ELECTION_TICKS", "[default: 100ms]", "cargo run", "-XPUT -d hello"] {
            assert!(text.contains(part), "{flag} lacks {part}:\n{text}");
        }
    }
    let output = run(&["bench", "--help"], &[]);
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
    let text = String::from_utf8(output.stdout).expect("text");
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let parts = ["--connections", "--consistency", "Examples:", "raftkv bench --preload", "Exit codes:"];
    for part in parts.into_iter().chain(["dealt to a connection beforehand, and waits"]) {
        assert!(text.contains(part), "bench --help lacks {part}:\n{text}");
    }
    for flag in ["--version", "-V", "-version"] {
        let output = run(&[flag], &[]);
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{flag}");
        assert_eq!(output.stdout, format!("raftkv {}\n", env!("CARGO_PKG_VERSION")).as_bytes(), "{flag}");
    }
}

#[test]
fn what_the_user_typed_wrong_ends_with_2_and_one_line() {
    for (args, parts) in [
        (&["-id", "0"][..], ["--id \"0\"", "from 1"]),
        (&["--cluster", ""], ["--cluster \"\"", "lacks a URL"]),
        (&["--cluster", "http://127.0.0.1:9021/"], ["--cluster \"http://127.0.0.1:9021/\"", "a path"]),
        (&["--cluster", "http://a:1,http://a:1"], ["--cluster", "listed twice"]),
        (&["--tick", "5 minutes"], ["--tick \"5 minutes\"", "100ms, 5s or 1m"]),
        (&["--log-format", "a\nb"], ["--log-format \"a\\nb\"", "text or json"]),
        (&["--electionticks", "5"], ["--electionticks", "did you mean --election-ticks?"]),
        (&["put", "my-key"], ["unexpected argument \"put\"", "--help"]),
        (&["bench", "--rate", "0"], ["--rate \"0\"", "from 1"]),
        (&["bench", "127.0.0.1:9121"], ["endpoint \"127.0.0.1:9121\"", "use http://HOST:PORT"]),
        (&["--id", "1", "bench"], ["unexpected argument \"bench\"", "--help"]),
    ] {
        let line = refusal(args, &[]);
        assert!(parts.iter().all(|part| line.contains(part)), "{args:?}: {line}");
    }
}

#[test]
fn a_first_start_needs_its_id_in_the_list() {
    let line = refusal(&["-id=4", "-cluster=http://127.0.0.1:1,http://127.0.0.1:2"], &[]);
    assert!(line.contains("--id 4") && line.contains("members 1 to 2"), "{line}");
}

#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_default() {
    let line = refusal(&[], &[("RAFTKV_ID", "7")]);
    assert!(line.contains("--id 7"), "{line}");
    let line = refusal(&["--id", "9"], &[("RAFTKV_ID", "7")]);
    assert!(line.contains("--id 9"), "{line}");
    let line = refusal(&["--id", "9"], &[("RAFTKV_ID", "not a number")]);
    assert!(line.contains("--id 9"), "what is not used need not be right: {line}");
    let line = refusal(&["--id", "9"], &[("RAFTKV_TICK", ""), ("RAFTKV_LISTEN", "")]);
    assert!(line.contains("--id 9"), "an empty variable is not set: {line}");
}

/// Whoever reads the line looks at a unit file or a manifest, not at a command line.
#[test]
fn a_wrong_variable_is_named_as_such() {
    for (variable, value) in [
        ("RAFTKV_ID", "0"),
        ("RAFTKV_CLUSTER", "http://a:1/x"),
        ("RAFTKV_PORT", "-1"),
        ("RAFTKV_LISTEN", "9121"),
        ("RAFTKV_LISTEN_PEER", "9021"),
        ("RAFTKV_TICK", "11s"),
        ("RAFTKV_ELECTION_TICKS", "2"),
        ("RAFTKV_REQUEST_TIMEOUT", "5"),
        ("RAFTKV_MAX_VALUE_BYTES", "5MiB"),
        ("RAFTKV_WAL_SEGMENT_BYTES", "1MiB"),
        ("RAFTKV_LOG_FORMAT", "xml"),
        ("RUST_LOG", "raftkv=loud=er"),
    ] {
        let line = refusal(&[], &[(variable, value)]);
        assert!(line.starts_with(&format!("{variable} \"{value}\": ")), "{line}");
    }
}

#[cfg(unix)]
#[test]
fn a_value_that_is_no_text_is_refused() {
    use std::os::unix::ffi::OsStrExt;

    let directory = TempDir::new().expect("a temporary directory");
    let mut command = command(&["--id"], &[], &directory);
    let output = command.arg(std::ffi::OsStr::from_bytes(b"\xff")).output().expect("run raftkv");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(output.stderr, "raftkv: --id \"\u{fffd}\": is not UTF-8\n".as_bytes());
}

/// `raftkv --help | true` is no error, and an error that nobody can read is no crash.
#[test]
fn nobody_reading_changes_no_exit_code() {
    let directory = TempDir::new().expect("a temporary directory");
    let unread = || {
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        writer
    };
    let help = command(&["--help"], &[], &directory).stdout(unread()).stderr(Stdio::piped()).output().expect("run");
    assert_eq!((help.status.code(), help.stderr.as_slice()), (Some(0), &b""[..]));
    let wrong = command(&["--id", "0"], &[], &directory).stderr(unread()).status().expect("run");
    assert_eq!(wrong.code(), Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn help_that_cannot_be_written_ends_with_1() {
    let directory = TempDir::new().expect("a temporary directory");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("open /dev/full");
    let output = command(&["--help"], &[], &directory).stdout(full).stderr(Stdio::piped()).output().expect("run");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.starts_with(b"raftkv: write to stdout: "), "{output:?}");
}

/// What `scripts/cluster` promises: the same nodes at the same addresses.
#[test]
fn the_procfile_and_the_script_start_the_same_three_members() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let procfile = std::fs::read_to_string(root.join("Procfile")).expect("read the Procfile");
    let script = std::fs::read_to_string(root.join("scripts/cluster")).expect("read scripts/cluster");
    let (mut ids, mut ports) = (Vec::new(), Vec::new());
    for line in procfile.lines() {
        let (_, flags) = line.split_once(" -- ").expect("flags behind --");
        let args = std::iter::once("raftkv").chain(flags.split(' ')).map(Into::into);
        let config = raftkv::cli::parse(args).expect("flags that raftkv takes").config;
        config.check_founding().expect("a founder");
        let urls: Vec<_> = config.cluster.iter().flat_map(|member| &member.urls).map(ToString::to_string).collect();
        assert!(script.contains(&format!("readonly members={}\n", urls.join(","))), "{line}");
        ids.push(config.id);
        ports.push(config.port);
    }
    assert_eq!((ids, ports), (vec![1, 2, 3], vec![12380, 22380, 32380]));
}
