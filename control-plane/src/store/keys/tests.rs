use std::collections::BTreeSet;

use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

use super::*;

fn organization_of(byte: u8) -> OrganizationId {
    OrganizationId::from_bytes([byte; 16])
}

#[test]
fn kind_bytes_are_distinct_and_none_is_the_adapters_own() {
    let bytes: BTreeSet<u8> = Kind::ALL.iter().map(|kind| *kind as u8).collect();
    assert_eq!(bytes.len(), Kind::ALL.len());
    assert!(!bytes.contains(&0));
}

#[test]
fn every_builder_is_covered_by_its_prefix_and_by_no_other_kind() {
    let organization = organization_of(1);
    let run_id = RunId::from_bytes([2; 16]);
    let environment_id = EnvironmentId::from_bytes([3; 16]);
    let user_id = UserId::from_bytes([4; 16]);
    let pool_id = PoolId::from_bytes([5; 16]);
    let runner_id = RunnerId::from_bytes([6; 16]);
    let authentication_id = AuthenticationId::from_bytes([7; 16]);
    let scope = VariableScope::Personal(organization, user_id);
    let quarantined_id = QuarantinedId::from_bytes([8; 16]);
    let subscriber_id = SubscriberId::from_bytes([10; 16]);
    let delivery_id = DeliveryId::from_bytes([11; 16]);
    let digest = Digest::from_bytes([9; 32]);
    let slot = QuarantineSlot {
        organization,
        run: run_id,
        phase: Phase::Plan,
        epoch: Epoch::new(1),
        generation: Generation::FIRST,
        runner: runner_id,
        kind: 0,
    };
    let pairs = [
        (sign_in(user_id, SignInId::from_bytes([1; 16])), sign_ins_of(user_id)),
        (membership(organization, user_id), memberships_of(organization)),
        (membership_by_user(user_id, organization), memberships_by_user(user_id)),
        (environment(organization, environment_id), environments_of(organization)),
        (environment_by_name(organization, "x"), environments_by_name(organization)),
        (state_version(environment_id, 9), state_versions_of(environment_id)),
        (variable(scope, "AWS_REGION"), variables_of(scope)),
        (run_by_environment(environment_id, run_id), runs_by_environment(environment_id)),
        (run_by_organization(organization, run_id), runs_by_organization(organization)),
        (open_run(run_id), open_runs()),
        (quarantine(slot), quarantine_of(organization, run_id)),
        (quarantined(organization, quarantined_id), quarantined_of(organization)),
        (blob_use(organization, &digest, BlobUser::Made(run_id)), blob_uses(organization, &digest)),
        (authentication(run_id, authentication_id), authentications_of(run_id)),
        (authentication_open(authentication_id), authentications_open()),
        (pool(organization, pool_id), pools_of(organization)),
        (pool_by_name(organization, "x"), pools_by_name(organization)),
        (runner_by_pool(pool_id, runner_id), runners_by_pool(pool_id)),
        (audit(organization, 1), audit_of(organization)),
        (outbox(organization, subscriber_id, delivery_id), outbox_of(organization, subscriber_id)),
        (
            delivered(organization, subscriber_id, delivery_id),
            delivered_of(organization, subscriber_id),
        ),
    ];
    for (key, own) in &pairs {
        for (other, prefix) in &pairs {
            assert_eq!(prefix.covers(key), key == other, "{prefix:?} and {key:?}");
        }
        let end = own.end().unwrap();
        assert!(key.as_bytes() < end.as_slice());
    }
}

#[test]
fn keys_tell_their_last_part() {
    let run_id = RunId::from_bytes([9; 16]);
    let by = run_by_environment(EnvironmentId::from_bytes([1; 16]), run_id);
    assert_eq!(by.last_id(), Some([9; 16]));
    assert_eq!(generation().last_id(), None);
    assert_eq!(environment_by_name(organization_of(1), "prod").name(), Some("prod"));
    let scope = VariableScope::Environment(organization_of(1), EnvironmentId::from_bytes([2; 16]));
    assert_eq!(variable(scope, "region").name(), Some("region"));
    assert_eq!(variable(VariableScope::Run(run_id), "region").name(), Some("region"));
    assert_eq!(run(run_id).name(), None);
    let user = BlobUser::Made(run_id);
    let use_key = blob_use(organization_of(1), &Digest::from_bytes([2; 32]), user);
    assert_eq!(read_blob_user(&use_key), Some(user));
}

#[test]
fn the_end_of_a_prefix_of_the_highest_bytes_is_the_next_kind() {
    let highest = audit_of(OrganizationId::from_bytes([0xff; 16]));
    assert_eq!(highest.end().unwrap(), vec![Kind::Audit as u8 + 1]);
}

proptest! {
    #[test]
    fn numbers_sort_as_numbers(a in any::<u64>(), b in any::<u64>()) {
        let organization = organization_of(1);
        prop_assert_eq!(audit(organization, a).cmp(&audit(organization, b)), a.cmp(&b));
        let environment_id = EnvironmentId::from_bytes([1; 16]);
        prop_assert_eq!(
            state_version(environment_id, a).cmp(&state_version(environment_id, b)),
            a.cmp(&b)
        );
    }

    #[test]
    fn runs_sort_by_their_ids(a in any::<[u8; 16]>(), b in any::<[u8; 16]>()) {
        let environment_id = EnvironmentId::from_bytes([1; 16]);
        let (x, y) = (RunId::from_bytes(a), RunId::from_bytes(b));
        prop_assert_eq!(
            run_by_environment(environment_id, x).cmp(&run_by_environment(environment_id, y)),
            a.cmp(&b)
        );
    }

    #[test]
    fn a_tenants_keys_are_never_anothers(
        a in any::<[u8; 16]>(), b in any::<[u8; 16]>(), name in ".{0,40}"
    ) {
        let (x, y) = (OrganizationId::from_bytes(a), OrganizationId::from_bytes(b));
        let key = environment_by_name(x, &name);
        prop_assert_eq!(environments_by_name(y).covers(&key), a == b);
        prop_assert!(key.name() == Some(name.as_str()));
    }
}
