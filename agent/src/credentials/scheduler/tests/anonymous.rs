//! Anonymous callers, whose tokens may be forged.

use super::*;

#[test]
fn each_anonymous_address_has_its_own_few_fetches() {
    let mut scheduler = Scheduler::new(BUDGET, 7, START);
    let mut ask = |digest: u8, last: u8| {
        scheduler.ask(Key::Token([digest; 32]), FairnessKey::Address([10, 0, 0, last].into()), START)
    };
    let answers: Vec<_> = (0..10).map(|digest| ask(digest, 1)).collect();
    assert_eq!(answers.iter().filter(|answer| **answer == Answer::Busy).count(), 10 - FETCHES_PER_ADDRESS);
    assert!(matches!(ask(99, 2), Answer::Joined { .. }));
    assert!(matches!(ask(0, 1), Answer::Joined { .. }), "the same token again");
}

#[test]
fn forged_tokens_get_a_few_calls_a_minute_and_disturb_nobody() {
    let mut world = World::new(|key, now| match key {
        Key::Token([_, _, _, 0, ..]) => lives(360)(key, now),
        _ => Outcome::Failed(Failure::Refused),
    });
    let (forger, mut token) = (0x0a00_0001, 1);
    let calls_until = |world: &World, minute: i64| {
        let end = START + SignedDuration::from_mins(minute);
        world.begun.iter().filter(|(at, ..)| *at < end).count()
    };
    for _ in 0..36_000 {
        world.ask_from(forger, token);
        // The last byte decides whether EKS Auth accepts it.
        token = (token + 1) | 1;
        world.pass(SignedDuration::from_millis(100));
    }
    let [first, half, hour] = [1, 30, 60].map(|minute| calls_until(&world, minute));
    assert!((2..=FETCHES_PER_ADDRESS + 2).contains(&first), "in the first minute: {first}");
    assert!(hour - half <= 8, "in the second half hour: {}", hour - half);
    assert!(
        matches!(world.ask_from(0x0a00_0002, 0x0100), Answer::Joined { likely: true }),
        "at another address"
    );
    assert!(world.scheduler.entries.len() <= 20, "{}", world.scheduler.entries.len());
}

#[test]
fn a_good_token_clears_its_address() {
    let mut world = World::new(|key, now| match key {
        Key::Token([_, _, _, 0, ..]) => lives(360)(key, now),
        _ => Outcome::Failed(Failure::Refused),
    });
    world.ask_from(1, 1);
    world.pass(secs(1));
    assert_eq!(world.ask_from(1, 0x0100), Answer::Busy, "one was refused a moment ago");
    world.pass(secs(10));
    for token in 2..6 {
        assert!(matches!(world.ask_from(1, token << 8), Answer::Joined { likely: true }), "{token}");
        world.pass(secs(1));
    }
}

#[test]
fn however_many_addresses_send_forged_tokens_the_next_has_room() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    world.scheduler = Scheduler::new(Budget { per_second: 1e6, burst: 1e6 }, 7, START);
    for address in 0..600 {
        let tokens = if address == 0 { 3 } else { 1 };
        for token in 0..tokens {
            let answer = world.ask_from(address, address << 8 | token << 4 | 1);
            assert!(matches!(answer, Answer::Joined { .. }), "{address} {token}: {answer:?}");
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(world.scheduler.entries.len() <= 513, "{}", world.scheduler.entries.len());
    assert!(!world.dropped.is_empty());
}

#[test]
fn after_refusals_a_caller_waits_for_the_call_that_is_under_way() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    let uid = pod_uid();
    for _ in 0..3 {
        assert_eq!(world.ask(uid), Answer::Joined { likely: true });
        world.pass(SignedDuration::from_millis(100));
        assert_eq!(world.ask(uid), Answer::Refused);
        world.pass(SignedDuration::from_mins(5));
    }
}

#[test]
fn a_refused_token_costs_a_call_and_the_next_one_another() {
    let mut tokens = 0;
    let mut world = World::new(move |key, now| {
        tokens += 1;
        if tokens == 1 { Outcome::TokenRefused } else { lives(360)(key, now) }
    });
    world.scheduler = Scheduler::new(Budget { per_second: 0.1, burst: 1.0 }, 7, START);
    let [bad, next] = [pod_uid(), pod_uid()];
    world.ask(bad);
    world.pass(secs(9));
    assert_eq!(
        (world.calls_of(bad), world.scheduler.calling, world.scheduler.in_flight()),
        (1, 0, 1),
        "it has no place"
    );
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.ask(next);
    world.pass(secs(2));
    assert_eq!((world.calls_of(bad), world.calls_of(next)), (2, 0), "it was first");
    world.pass(secs(10));
    assert_eq!((world.calls_of(bad), world.calls_of(next), world.lives.len()), (2, 1, 2));
}
