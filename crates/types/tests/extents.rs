//! The extent map against a naive model: one source for each extent, in a vector.

use std::ops::Range;

use proptest::prelude::*;
use types::extents::{ExtentMapError, MAX_RUNS, MERGE_GAP_EXTENTS, Overlay, ZERO_RUN_EXTENTS};
use types::{ExtentIndex, ExtentMap, LayerIndex, Source};

fn model(map: &ExtentMap) -> Vec<Source> {
    map.runs().iter().flat_map(|run| std::iter::repeat_n(run.source, run.count as usize)).collect()
}

/// What must hold for any map, however it was made.
fn check_invariants(map: &ExtentMap) {
    assert!((1..=MAX_RUNS).contains(&map.runs().len()), "{} runs", map.runs().len());
    let mut end = 0;
    for run in map.runs() {
        assert_eq!(run.start.0, end, "a gap or an overlap");
        assert!(run.count > 0, "an empty run");
        end += run.count;
    }
    assert_eq!(end, map.extent_count());
    assert!(map.runs().windows(2).all(|pair| pair[0].source != pair[1].source), "neighbours of one source");
    let model = model(map);
    for (extent, source) in (0u32..).zip(&model) {
        assert_eq!(map.source_of(ExtentIndex(extent)), Some(*source));
    }
    assert_eq!(map.source_of(ExtentIndex(end)), None);
    assert_eq!(map.data_extent_count() as usize, model.iter().filter(|source| **source != Source::Zero).count());
    let wire = postcard::to_stdvec(map).unwrap();
    assert_eq!(&postcard::from_bytes::<ExtentMap>(&wire).unwrap(), map);
}

fn ranges(extents: &[bool]) -> Vec<Range<u32>> {
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for (extent, _) in (0u32..).zip(extents).filter(|(_, set)| **set) {
        match ranges.last_mut() {
            Some(last) if last.end == extent => last.end += 1,
            _ => ranges.push(extent..extent + 1),
        }
    }
    ranges
}

/// Sets of extents from few long stretches to many single ones.
fn some_extents(count: usize) -> impl Strategy<Value = Vec<bool>> {
    let sparse = proptest::collection::vec(proptest::bool::weighted(0.02), count);
    let dense = proptest::collection::vec(proptest::bool::weighted(0.5), count);
    let stretches = proptest::collection::vec((0..count, 1..200usize), 0..12).prop_map(move |stretches| {
        let mut set = vec![false; count];
        for (start, len) in stretches {
            let end = (start + len).min(count);
            set[start..end].fill(true);
        }
        set
    });
    prop_oneof![sparse, dense, stretches]
}

fn check_overlay(base: &ExtentMap, touched: &[bool], layer: LayerIndex) -> Overlay {
    let overlay = base.overlay(&ranges(touched), layer);
    check_invariants(&overlay.map);
    let (before, after) = (model(base), model(&overlay.map));
    assert_eq!(before.len(), after.len());
    let copied: Vec<bool> = {
        let mut copied = vec![false; after.len()];
        for range in &overlay.copied {
            copied[range.start as usize..range.end as usize].fill(true);
        }
        copied
    };
    for extent in 0..after.len() {
        assert!(!touched[extent] || copied[extent], "touched extent {extent} is not copied");
        let expected = if copied[extent] { Source::Layer(layer) } else { before[extent] };
        assert_eq!(after[extent], expected, "extent {extent}");
    }
    overlay
}

/// As `vm::harness`: FARFORK_COUNT chooses the number of cases, FARFORK_SEED the seed.
fn config() -> ProptestConfig {
    let cases = if std::env::var("FARFORK_COUNT").is_ok_and(|count| count == "full") { 20_000 } else { 300 };
    let seed =
        std::env::var("FARFORK_SEED").map_or_else(|_| u64::from(fastrand::u32(..)), |seed| seed.parse().expect("a number"));
    println!("FARFORK_SEED={seed}\nheld: {cases} cases");
    ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(seed),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_frozen_layer_keeps_all_data_and_makes_long_holes_zero(data in some_extents(3000)) {
        let map = ExtentMap::from_data(3000, &ranges(&data), LayerIndex(0));
        check_invariants(&map);
        for (extent, source) in model(&map).into_iter().enumerate() {
            assert!(!data[extent] || source == Source::Layer(LayerIndex(0)), "extent {extent} is lost");
        }
        for run in map.runs().iter().filter(|run| run.source == Source::Zero) {
            assert!(run.count >= ZERO_RUN_EXTENTS);
        }
        // Where the bound on runs does not force more, exactly the long holes are zero.
        let holes: Vec<Range<u32>> = ranges(&data.iter().map(|set| !set).collect::<Vec<_>>());
        let long: Vec<_> = holes.into_iter().filter(|hole| hole.end - hole.start >= ZERO_RUN_EXTENTS).collect();
        if long.len() * 2 < MAX_RUNS {
            let zero: Vec<_> = map.runs().iter().filter(|run| run.source == Source::Zero).map(types::Run::extents).collect();
            prop_assert_eq!(zero, long);
        }
    }

    #[test]
    fn layers_over_layers_agree_with_the_model(
        data in some_extents(2000),
        touched in proptest::collection::vec(some_extents(2000), 1..8),
    ) {
        let mut map = ExtentMap::from_data(2000, &ranges(&data), LayerIndex(0));
        for (layer, touched) in (1..).map(LayerIndex).zip(&touched) {
            map = check_overlay(&map, touched, layer).map;
        }
        let used = map.used_layers();
        prop_assert!(used.is_sorted());
        let renumbered = map.renumbered(|layer| LayerIndex(u16::try_from(used.binary_search(&layer).unwrap()).unwrap()));
        check_invariants(&renumbered);
        prop_assert_eq!(renumbered.used_layers().len(), used.len());
    }

    #[test]
    fn what_few_touches_copy_is_little(touched in proptest::collection::vec(0..100_000u32, 1..100)) {
        let base = ExtentMap::from_data(100_000, std::slice::from_ref(&(0..100_000)), LayerIndex(0));
        let set: std::collections::BTreeSet<u32> = touched.into_iter().collect();
        let ranges: Vec<_> = set.iter().map(|extent| *extent..extent + 1).collect();
        let overlay = base.overlay(&ranges, LayerIndex(1));
        let copied: u32 = overlay.copied.iter().map(|range| range.end - range.start).sum();
        let touched = u32::try_from(set.len()).unwrap();
        prop_assert!(copied >= touched && copied <= touched * (1 + MERGE_GAP_EXTENTS));
    }

    #[test]
    fn run_lengths_are_parsed_or_refused(lengths in proptest::collection::vec((0..5u32, 0..3u16), 0..30)) {
        let runs: Vec<_> = lengths
            .iter()
            .map(|(count, source)| (*count, if *source == 0 { Source::Zero } else { Source::Layer(LayerIndex(*source)) }))
            .collect();
        let valid = !runs.is_empty()
            && runs.iter().all(|(count, _)| *count > 0)
            && runs.windows(2).all(|pair| pair[0].1 != pair[1].1);
        let map = ExtentMap::from_lengths(runs);
        prop_assert_eq!(map.is_ok(), valid);
        if let Ok(map) = map {
            check_invariants(&map);
        }
    }
}

#[test]
fn the_worst_patterns_stay_within_the_bound() {
    let count = 1 << 20;
    let base = ExtentMap::from_data(count, &[], LayerIndex(0));
    for stride in [2, 3, 7, 64, 1024, 100_000] {
        let touched: Vec<_> = (0..count / stride).map(|n| n * stride..n * stride + 1).collect();
        let overlay = base.overlay(&touched, LayerIndex(1));
        assert!(overlay.map.runs().len() <= MAX_RUNS, "stride {stride}");
        // And again on top of that, shifted.
        let touched: Vec<_> = touched.iter().map(|range| range.start + 1..range.end + 1).collect();
        assert!(overlay.map.overlay(&touched, LayerIndex(2)).map.runs().len() <= MAX_RUNS, "stride {stride}");
    }
}

/// The bound costs no more than it must: of many equal holes as many stay zero as there may be, and of many equal gaps only so
/// many are copied as are too many.
#[test]
fn equal_candidates_are_not_all_given_up() {
    let data: Vec<_> = (0..2000).map(|n| n * 64..n * 64 + 32).collect();
    let frozen = ExtentMap::from_data(2000 * 64, &data, LayerIndex(0));
    assert!(frozen.runs().len() >= MAX_RUNS - 2);
    let base = ExtentMap::from_data(2000 * 64, &[], LayerIndex(0));
    let touched: Vec<_> = (0..400).map(|n| n * 10..n * 10 + 1).collect();
    let overlay = base.overlay(&touched, LayerIndex(1));
    assert!((MAX_RUNS - 2..=MAX_RUNS).contains(&overlay.map.runs().len()));
    let copied: u32 = overlay.copied.iter().map(|range| range.end - range.start).sum();
    assert!(copied <= 400 + 9 * 145, "{copied} extents copied for 400");
}

#[test]
fn an_untouched_region_keeps_its_map() {
    let base = ExtentMap::from_data(100, &[10..20, 60..100], LayerIndex(0));
    assert_eq!(base.overlay(&[], LayerIndex(1)), Overlay { map: base.clone(), copied: vec![] });
}

#[test]
fn every_extent_touched_leaves_one_run() {
    let base = ExtentMap::from_data(100, &[10..20, 60..100], LayerIndex(0));
    let whole = 0..100;
    let overlay = base.overlay(std::slice::from_ref(&whole), LayerIndex(1));
    assert_eq!(overlay.map.runs().len(), 1);
    assert_eq!(overlay.copied, [whole]);
    assert_eq!(overlay.map.used_layers(), [LayerIndex(1)]);
}

#[test]
fn bad_lists_of_runs_say_what_is_wrong() {
    let zero = Source::Zero;
    let data = Source::Layer(LayerIndex(0));
    let refused = |lengths: Vec<(u32, Source)>| ExtentMap::from_lengths(lengths).unwrap_err();
    assert_eq!(refused(vec![]), ExtentMapError::Empty);
    assert_eq!(refused(vec![(1, zero), (0, data)]), ExtentMapError::EmptyRun { at: 1 });
    assert_eq!(refused(vec![(1, zero), (2, zero)]), ExtentMapError::SplitRun { at: 1 });
    assert_eq!(refused(vec![(u32::MAX, zero), (1, data)]), ExtentMapError::TooLong);
    let many = (0..=MAX_RUNS).map(|n| (1, if n % 2 == 0 { zero } else { data })).collect();
    assert_eq!(refused(many), ExtentMapError::TooManyRuns);
}
