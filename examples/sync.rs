//! The floor under a lone client's write: what one fdatasync takes on the disk that holds a directory, behind one write
//! into a file that is zeroed and allocated beforehand, as the log's segments are. Frames of 512 bytes and of 4 KiB,
//! in microseconds, as JSON. `scripts/bench` sets raftkv's latency beside it.
//!
//!     cargo run --release --example sync -- DIRECTORY [SYNCS]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use hdrhistogram::Histogram;

const FRAMES: [usize; 2] = [512, 4096];

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let directory = args.next().context("usage: sync DIRECTORY [SYNCS]")?;
    let syncs = args.next().map_or(Ok(2000), |text| text.parse()).context("SYNCS is a number")?;
    let path = Path::new(&directory).join("raftkv-sync-floor");
    let mut figures = serde_json::Map::new();
    for frame_bytes in FRAMES {
        let nanos = measure(&path, frame_bytes, syncs);
        // It goes first, whatever came of it: it is not small.
        fs::remove_file(&path).context("remove the file")?;
        let nanos = nanos?;
        let at = |quantile| nanos.value_at_quantile(quantile) as f64 / 1e3;
        let figure = serde_json::json!({ "p50_us": at(0.5), "p99_us": at(0.99), "mean_us": nanos.mean() / 1e3 });
        figures.insert(frame_bytes.to_string(), figure);
    }
    println!("{}", serde_json::Value::Object(figures));
    Ok(())
}

fn measure(path: &Path, frame_bytes: usize, syncs: usize) -> anyhow::Result<Histogram<u64>> {
    let mut file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let zeros = vec![0; 1 << 20];
    for _ in 0..(frame_bytes * syncs).div_ceil(zeros.len()) {
        file.write_all(&zeros).context("zero the file")?;
    }
    file.sync_all().context("sync the zeros")?;
    let mut nanos = Histogram::new_with_bounds(100, 60_000_000_000, 3)?;
    let frame = vec![b'f'; frame_bytes];
    for place in 0..syncs {
        let begin = Instant::now();
        file.write_all_at(&frame, (place * frame_bytes) as u64).context("write a frame")?;
        file.sync_data().context("sync a frame")?;
        nanos.saturating_record(begin.elapsed().as_nanos() as u64);
    }
    Ok(nanos)
}
