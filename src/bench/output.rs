//! Where a run's figures go: a table or JSON on stdout, files where asked for, and the exit code.

use std::fs;
use std::io::{self, ErrorKind::BrokenPipe, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::{Plan, plot, run};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Clone)]
pub struct Output {
    /// On stdout.
    pub format: Format,
    pub json: Option<PathBuf>,
    pub svg: Option<PathBuf>,
}

/// Runs the plan and tells. An error is a line for stderr; it is also one that nothing succeeded.
pub fn main(plan: &Plan, output: &Output) -> anyhow::Result<()> {
    let report = run(plan)?;
    let mut json = serde_json::to_string_pretty(&report).context("write the figures as JSON")?;
    json.push('\n');
    let text = match output.format {
        Format::Table => report.to_string(),
        Format::Json => json.clone(),
    };
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != BrokenPipe => return Err(error).context("write to stdout"),
        // The reader has seen enough.
        Ok(()) | Err(_) => {}
    }
    save(output.json.as_deref(), || json)?;
    save(output.svg.as_deref(), || plot::svg(&report))?;
    anyhow::ensure!(report.operations > 0, "nothing succeeded: {}", super::report::failures_line(&report.failures));
    Ok(())
}

fn save(path: Option<&Path>, content: impl FnOnce() -> String) -> anyhow::Result<()> {
    match path {
        Some(path) => fs::write(path, content()).with_context(|| format!("write {}", path.display())),
        None => Ok(()),
    }
}
