//! What is left of a run: a directory of its own while it lasts, one line that sums it up, and, where something failed,
//! everything that tells why.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use serde_json::json;

use crate::course::Course;
use crate::harness::copy_dir;
use crate::history::{Call, History, Operation, Outcome, Report, Violation};
use crate::options::Options;
use crate::world::World;

/// Where a run lives, and its records stay if it fails.
pub fn home(seed: u64) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory");
    target.join("torment").join(seed.to_string())
}

/// An empty directory, with nothing of an earlier run of the same seed.
pub fn begin(home: &Path) -> anyhow::Result<()> {
    if home.exists() {
        fs::remove_dir_all(home)?;
    }
    Ok(fs::create_dir_all(home)?)
}

/// A member that panics has met a state that cannot be.
pub fn no_panic(logs: &[PathBuf]) -> anyhow::Result<()> {
    for log in logs {
        if let Some(line) = fs::read_to_string(log)?.lines().find(|line| line.contains("panicked")) {
            bail!("{}: {line}", log.display());
        }
    }
    Ok(())
}

pub fn count_snapshots(course: &Course, logs: &[PathBuf]) -> anyhow::Result<()> {
    for log in logs {
        let text = fs::read_to_string(log)?;
        let count = |what: &str| text.lines().filter(|line| line.contains(what)).count() as u64;
        course.count("snapshots", count("snapshot taken"));
        course.count("snapshots installed", count("snapshot installed"));
    }
    Ok(())
}

const COUNTED: [&str; 18] = [
    "kills",
    "pauses",
    "partitions",
    "one-way cuts",
    "slow links",
    "losses",
    "trickles",
    "packet losses",
    "power cuts",
    "failed syncs",
    "full disks",
    "wiped",
    "flips",
    "flips refused",
    "members added",
    "members removed",
    "snapshots",
    "snapshots installed",
];

/// What was done so far.
pub fn counts(course: &Course) -> String {
    let counted = COUNTED.map(|what| (course.counted(what), what));
    counted.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!(", {count} {what}")).collect()
}

/// The one line.
pub fn summary(
    options: &Options,
    seed: u64,
    time: Duration,
    course: &Course,
    history: &History,
    result: &anyhow::Result<()>,
    verdict: &Result<Report, Violation>,
) -> String {
    let operations = history.operations();
    let of = |wanted: fn(&Operation) -> bool| operations.iter().filter(|operation| wanted(operation)).count();
    let mut line = format!(
        "torment: seed {seed}, {} nodes, {:.0} s, {} operations: {} writes and {} reads done, {} not applied, {} unknown",
        options.nodes,
        time.as_secs_f64(),
        operations.len(),
        of(|operation| matches!((&operation.call, &operation.outcome), (Call::Put(_), Outcome::Done { .. }))),
        of(|operation| matches!((&operation.call, &operation.outcome), (Call::Get, Outcome::Done { .. }))),
        of(|operation| matches!(operation.outcome, Outcome::NotApplied)),
        of(|operation| matches!(operation.outcome, Outcome::Unknown)),
    );
    line.push_str(&counts(course));
    line.push_str(match (result, verdict) {
        (Err(_), _) => "; FAILED",
        (Ok(()), Ok(_)) => "; nothing lost, linearizable",
        (Ok(()), Err(violation)) if violation.gave_up() => "; NOT KNOWN to be linearizable",
        (Ok(()), Err(_)) => "; NOT LINEARIZABLE",
    });
    line
}

/// The history, the drawing of what is wrong with it, and what is on disks that go with us.
pub fn keep(world: &mut World<'_>, history: &History, verdict: &Result<Report, Violation>) -> anyhow::Result<()> {
    let home = world.home();
    let mut file = BufWriter::new(File::create(home.join("history.jsonl"))?);
    for operation in history.operations() {
        writeln!(file, "{}", line(operation))?;
    }
    file.flush()?;
    if let Err(violation) = verdict {
        fs::write(home.join("violation.txt"), violation.to_string())?;
        fs::write(home.join("violation.svg"), violation.svg())?;
    }
    world.end()?;
    for member in &world.members {
        if member.disk.is_some() && member.data_dir().exists() {
            copy_dir(&member.data_dir(), &home.join(format!("data-{}", member.id)));
        }
    }
    Ok(())
}

fn line(operation: &Operation) -> serde_json::Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (call, value) = match &operation.call {
        Call::Put(value) => ("put", Some(text(value))),
        Call::Delete => ("delete", None),
        Call::Get => ("get", None),
    };
    let (outcome, at, read) = match &operation.outcome {
        Outcome::Done { at, read } => ("done", Some(*at), read.as_deref().map(text)),
        Outcome::NotApplied => ("not applied", None, None),
        Outcome::Unknown => ("unknown", None, None),
    };
    json!({
        "client": operation.client, "key": text(&operation.key), "call": call, "value": value,
        "invoked": operation.invoked, "outcome": outcome, "at": at, "read": read,
    })
}
