//! Which key an operation takes: uniform, Zipf or one after the other. A key is a number here; `template` writes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The skew of YCSB's requests.
const THETA: f64 = 0.99;
/// Ranks whose weights are added one by one.
const ZETA_EXACT_MAX: u64 = 1_000_000;

/// How keys are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    Uniform,
    /// Few keys take most of the load; key 0 the most.
    Zipf,
    /// One after the other, over all connections together, and again from the first.
    Sequential,
}

/// Draws keys below a number of keys. Clones draw from the same sequence where there is one.
#[derive(Debug, Clone)]
pub enum Keys {
    Uniform(u64),
    Zipf(Zipf),
    Sequential { keys: u64, next: Arc<AtomicU64> },
}

impl Keys {
    pub fn new(distribution: Distribution, keys: u64) -> Self {
        assert!(keys > 0, "a run needs a key");
        match distribution {
            Distribution::Uniform => Keys::Uniform(keys),
            Distribution::Zipf => Keys::Zipf(Zipf::new(keys)),
            Distribution::Sequential => Keys::Sequential { keys, next: Arc::default() },
        }
    }

    pub fn draw(&self, random: &mut fastrand::Rng) -> u64 {
        match self {
            Keys::Uniform(keys) => random.u64(..keys),
            Keys::Zipf(zipf) => zipf.rank(random.f64()),
            Keys::Sequential { keys, next } => next.fetch_add(1, Ordering::Relaxed) % keys,
        }
    }
}

/// Zipf's law in constant time, as YCSB draws it: Gray et al., "Quickly Generating Billion-Record Synthetic Databases"
/// (1994), §3.2. The sum over all keys is made once, by `zeta`.
#[derive(Debug, Clone, Copy)]
pub struct Zipf {
    keys: u64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    fn new(keys: u64) -> Self {
        let zeta = zeta(keys);
        let eta = (1.0 - (2.0 / keys as f64).powf(1.0 - THETA)) / (1.0 - first_two() / zeta);
        Zipf { keys, zeta, eta }
    }

    /// The rank, from 0, of a number drawn evenly from 0 to 1.
    fn rank(&self, drawn: f64) -> u64 {
        let scaled = drawn * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        // Also all that there is for two keys, where `eta` is no number.
        if scaled < first_two() {
            return 1;
        }
        let rank = self.keys as f64 * (self.eta * drawn - self.eta + 1.0).powf(1.0 / (1.0 - THETA));
        (rank as u64).min(self.keys - 1)
    }
}

/// The sum of the ranks' weights. Behind the first million by Euler and Maclaurin, whose error is less than that of the
/// sum itself: it takes no longer for any number of keys.
fn zeta(keys: u64) -> f64 {
    let weight = |rank: f64| rank.powf(-THETA);
    let exact = keys.min(ZETA_EXACT_MAX);
    let sum: f64 = (1..=exact).map(|rank| weight(rank as f64)).sum();
    let (from, to) = (exact as f64, keys as f64);
    let integral = (to.powf(1.0 - THETA) - from.powf(1.0 - THETA)) / (1.0 - THETA);
    let slope = |rank: f64| -THETA * rank.powf(-THETA - 1.0);
    sum + integral + (weight(to) - weight(from)) / 2.0 + (slope(to) - slope(from)) / 12.0
}

fn first_two() -> f64 {
    1.0 + 0.5_f64.powf(THETA)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(distribution: Distribution, keys: u64, draws: u64) -> Vec<u64> {
        let (source, mut random) = (Keys::new(distribution, keys), fastrand::Rng::with_seed(7));
        let mut counts = vec![0; keys as usize];
        for _ in 0..draws {
            counts[source.draw(&mut random) as usize] += 1;
        }
        counts
    }

    #[test]
    fn uniform_takes_all_keys_alike() {
        let counts = counts(Distribution::Uniform, 10, 100_000);
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }

    #[test]
    fn zipf_gives_each_rank_its_share() {
        let counts = counts(Distribution::Zipf, 1000, 1_000_000);
        let zeta: f64 = (1..=1000).map(|rank| f64::from(rank).powf(-THETA)).sum();
        let share = |rank: usize| counts[rank - 1] as f64 / 1e6 * zeta * (rank as f64).powf(THETA);
        assert!((0.98..1.02).contains(&share(1)) && (0.98..1.02).contains(&share(2)), "{:?}", &counts[..4]);
        // Behind the first two the method is an approximation; the tail as a whole has its weight.
        let tail: u64 = counts[100..].iter().sum();
        let weight: f64 = (101..=1000).map(|rank| f64::from(rank).powf(-THETA)).sum();
        assert!((0.9..1.1).contains(&(tail as f64 / 1e6 / (weight / zeta))), "{tail}");
    }

    #[test]
    fn the_sum_is_right_and_needs_no_time_for_many_keys() {
        for keys in [1, 2, ZETA_EXACT_MAX, ZETA_EXACT_MAX + 1, 3 * ZETA_EXACT_MAX] {
            let exact: f64 = (1..=keys).map(|rank| (rank as f64).powf(-THETA)).sum();
            assert!((zeta(keys) / exact - 1.0).abs() < 1e-10, "{keys}: {} and {exact}", zeta(keys));
        }
        // One by one these would take an hour.
        let source = Keys::new(Distribution::Zipf, super::super::KEYS_MAX);
        assert!(source.draw(&mut fastrand::Rng::with_seed(7)) < super::super::KEYS_MAX);
    }

    #[test]
    fn zipf_stays_within_few_keys() {
        for keys in 1..5 {
            assert_eq!(counts(Distribution::Zipf, keys, 1000).iter().sum::<u64>(), 1000);
        }
    }

    #[test]
    fn sequential_is_one_sequence_for_all_clones() {
        let (one, mut random) = (Keys::new(Distribution::Sequential, 3), fastrand::Rng::with_seed(7));
        let other = one.clone();
        let drawn = [&one, &other, &one, &other].map(|keys| keys.draw(&mut random));
        assert_eq!(drawn, [0, 1, 2, 0]);
    }
}
