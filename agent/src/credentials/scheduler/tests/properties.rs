//! What holds whatever happens.

use proptest::prelude::*;

use super::*;

/// As many fetches as an address may have.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const MAX_FETCHES: u8 = FETCHES_PER_ADDRESS as u8;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However many pods there are within the budget, however long their credentials live and whatever was due at once:
    /// nothing that is in use expires before its replacement is there.
    #[test]
    fn nothing_in_use_expires_while_there_is_budget(
        pods in 1_usize..400,
        minutes in 30_i64..400,
        seed in any::<u64>(),
        together in any::<bool>(),
    ) {
        let mut world = World::new(lives(minutes));
        world.scheduler = Scheduler::new(BUDGET, seed, START);
        let uids: Vec<_> = (0..pods).map(|_| pod_uid()).collect();
        for (n, uid) in uids.iter().enumerate() {
            world.ask(*uid);
            if !together {
                world.pass(secs(7));
                uids[..n].iter().for_each(|uid| world.scheduler.asked(Key::Pod(*uid), world.now));
            }
        }
        world.pass(secs(60));
        for _ in 0..40 {
            world.pass(SignedDuration::from_mins(minutes) / 12);
            for uid in &uids {
                world.scheduler.asked(Key::Pod(*uid), world.now);
                let life = world.lives[&Key::Pod(*uid)];
                prop_assert!(world.now < life.expiration);
                let floor = life.fresh_until(freshness::Floor::Imds);
                prop_assert!(world.now < floor, "below the floor");
            }
            world.act();
        }
    }

    /// Waiting keys take turns: none is served twice before all are served once.
    #[test]
    fn turns_are_fair(mut weights in proptest::collection::vec(1..=MAX_FETCHES, 2..8), seed in any::<u64>()) {
        weights.sort_unstable();
        let mut scheduler = Scheduler::new(Budget { per_second: 1.0, burst: 0.0 }, seed, START);
        for (fairness_key, weight) in (0_u8..).zip(&weights) {
            for fetch in 0..*weight {
                let address = [10, 0, 0, fairness_key].into();
                let key = Key::Token([fairness_key * 32 + fetch; 32]);
                let answer = scheduler.ask(key, FairnessKey::Address(address), START);
                let joined = matches!(answer, Answer::Joined { .. });
                prop_assert!(joined);
            }
        }
        let mut served = vec![0; weights.len()];
        let mut now = START;
        while let Some(at) = scheduler.wake_at() {
            now = now.max(at);
            let Some(Action::Fetch(Key::Token(digest), _)) = scheduler.next(now) else { continue };
            let fairness_key = usize::from(digest[0] / 32);
            for (other, times) in served.iter().enumerate() {
                let has_more = *times < weights[other];
                prop_assert!(!has_more || *times >= served[fairness_key], "{served:?}");
            }
            served[fairness_key] += 1;
            if served.iter().zip(&weights).all(|(a, b)| a == b) {
                break;
            }
        }
        prop_assert!(served.iter().all(|times| *times > 0));
    }
}
