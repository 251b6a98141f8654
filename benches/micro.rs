//! Times every workload, for `cargo bench`.

mod workloads;

use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput};

fn main() {
    let criterion =
        Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    let mut criterion = criterion.sample_size(20).configure_from_args();
    for workload in workloads::ALL {
        // Started when it is its turn, if it was asked for.
        let mut run = None;
        let mut group = criterion.benchmark_group(workload.name);
        // As many runs in each sample: some take so long that more would take minutes.
        group.sampling_mode(SamplingMode::Flat);
        group.throughput(Throughput::Elements(workload.operations));
        group.bench_function("time", |bencher| bencher.iter(run.get_or_insert_with(workload.start)));
        group.finish();
    }
    criterion.final_summary();
}
