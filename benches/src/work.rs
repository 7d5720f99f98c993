//! Keys, access patterns and the interleaving clock.

use std::time::Instant;

/// splitmix64: the same work in every run.
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    #[allow(clippy::cast_precision_loss)]
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A key of 20 bytes.
pub fn key(number: usize) -> String {
    format!("user:profile:{number:07}")
}

/// Indexes of `keys` keys, drawn by Zipf's law.
#[allow(clippy::cast_precision_loss)]
pub fn zipf(keys: usize, exponent: f64, count: usize, seed: u64) -> Vec<u32> {
    let mut sums = Vec::with_capacity(keys);
    let mut sum = 0.0;
    for rank in 1..=keys {
        sum += (rank as f64).powf(-exponent);
        sums.push(sum);
    }
    let mut chance = Chance(seed);
    // Popular keys lie scattered, as in life.
    let mut places: Vec<u32> = (0..keys as u32).collect();
    for place in (1..keys).rev() {
        places.swap(place, (chance.next() % (place as u64 + 1)) as usize);
    }
    let draw = |chance: &mut Chance| places[sums.partition_point(|below| *below < chance.unit() * sum).min(keys - 1)];
    (0..count).map(|_| draw(&mut chance)).collect()
}

/// One case: a name and what it does, returning nanoseconds per operation.
pub type Case<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Runs every case once per round, each round beginning with another, and prints medians as ratios to the first case.
pub fn table(title: &str, unit: &str, rounds: usize, mut cases: Vec<Case<'_>>) {
    let mut times = vec![Vec::with_capacity(rounds); cases.len()];
    for round in 0..rounds {
        for step in 0..cases.len() {
            let case = (round + step) % cases.len();
            times[case].push((cases[case].1)());
        }
    }
    println!("\n### {title}\n\n| case | {unit} (median) | p10 to p90 | ratio |\n| --- | --- | --- | --- |");
    let mut reference = None;
    for ((name, _), times) in cases.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let at = |part: usize| times[(times.len() - 1) * part / 10];
        let median = at(5);
        let reference = *reference.get_or_insert(median);
        println!("| {name} | {median:.1} | {:.1} to {:.1} | {:.2} |", at(1), at(9), median / reference);
    }
}

/// Nanoseconds per operation of `work`, which does `operations`.
#[allow(clippy::cast_precision_loss)]
pub fn time(operations: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64 / operations as f64
}
