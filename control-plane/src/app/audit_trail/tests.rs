use std::time::Duration;

use latchkey_domain::policy::MfaPolicy;

use super::*;
use crate::app::fixture::{Fixture, ORGANIZATION};
use crate::store::Batch;

/// A chain with the records of the fixture, then `count` more, a second apart.
async fn fixture(count: u64) -> (Fixture, u64) {
    let fixture = Fixture::new(MfaPolicy::Never).await;
    let organization = fixture.organization().await;
    let before = fixture.app.audit_head(organization).await.unwrap().sequence;
    fixture.clock.advance(Duration::from_secs(3600));
    for number in 0..count {
        let actor = if number % 2 == 0 { "user eve" } else { "runner 7" };
        let mut draft = fixture.app.draft(organization, actor, "try", format!("run {number}"));
        if number % 10 == 0 {
            draft = draft.with("environment", "db");
        }
        fixture.store.commit(Batch::new().audit(draft)).await.unwrap();
        fixture.clock.advance(Duration::from_secs(1));
    }
    (fixture, before)
}

async fn listed(fixture: &Fixture, filter: &AuditFilter, size: u32) -> (Vec<u64>, usize) {
    let mut page = PageRequest { size, token: String::new() };
    let (mut all, mut pages) = (vec![], 0);
    loop {
        let app = &fixture.app;
        let found = app.list_audit(&fixture.owner, ORGANIZATION, filter.clone(), page.clone());
        let found = found.await.unwrap();
        assert!(found.items.len() <= usize::try_from(size).unwrap());
        all.extend(found.items.iter().map(|record| record.sequence));
        pages += 1;
        match found.next {
            Some(next) => page.token = next,
            None => return (all, pages),
        }
    }
}

#[tokio::test]
async fn records_are_found_by_who_what_where_and_when() {
    let (fixture, before) = fixture(100).await;
    let base = AuditFilter::default();
    let check = async |filter: AuditFilter, expect: Vec<u64>| {
        for size in [7, 200] {
            assert_eq!(listed(&fixture, &filter, size).await.0, expect, "{filter:?}");
        }
    };
    let numbers = |of: &dyn Fn(u64) -> bool| -> Vec<u64> {
        (0..100).filter(|number| of(*number)).map(|number| before + 1 + number).collect()
    };
    let eve = AuditFilter { actor: "eve".into(), ..base.clone() };
    check(eve, numbers(&|number| number % 2 == 0)).await;
    let runner = AuditFilter { actor: "runner 7".into(), ..base.clone() };
    check(runner, numbers(&|number| number % 2 == 1)).await;
    let run = AuditFilter { run_id: "5".into(), ..base.clone() };
    check(run, numbers(&|number| number == 5)).await;
    let prefix = AuditFilter { subject_prefix: "run 5".into(), ..base.clone() };
    check(prefix, numbers(&|number| number == 5 || number / 10 == 5)).await;
    let environment =
        AuditFilter { environment: "db".into(), action: "try".into(), ..base.clone() };
    check(environment, numbers(&|number| number % 10 == 0)).await;
    let made = AuditFilter { environment: "web".into(), ..base.clone() };
    assert_eq!(listed(&fixture, &made, 200).await.0.len(), 1);
    let now = fixture.app.now().as_millis();
    let back = |seconds: i64| Some(Timestamp::from_millis(now - seconds * 1000));
    let times = AuditFilter { from: back(30), until: back(10), ..base };
    check(times, numbers(&|number| (70..90).contains(&number))).await;
}

#[tokio::test]
async fn a_page_looks_through_a_bounded_part_and_the_next_goes_on() {
    let (fixture, before) = fixture(0).await;
    let organization = fixture.organization().await;
    let many = u64::try_from(LOOK_THROUGH).unwrap() + 10;
    for _ in 0..many.div_ceil(500) {
        let mut batch = Batch::new();
        for _ in 0..500 {
            batch = batch.audit(fixture.app.draft(organization, "user eve", "try", "nothing"));
        }
        fixture.store.commit(batch).await.unwrap();
    }
    let draft = fixture.app.draft(organization, "user eve", "win", "all");
    fixture.store.commit(Batch::new().audit(draft)).await.unwrap();
    let filter = AuditFilter { action: "win".into(), ..AuditFilter::default() };
    let (found, pages) = listed(&fixture, &filter, 50).await;
    assert_eq!(found, [before + many.div_ceil(500) * 500 + 1]);
    assert_eq!(pages, 2);
}

#[tokio::test]
async fn an_export_begins_where_asked_and_ends_at_the_head_of_its_beginning() {
    let (fixture, before) = fixture(150).await;
    let app = &fixture.app;
    let mut export = app.export_audit(&fixture.owner, ORGANIZATION, before + 3).await.unwrap();
    let organization = fixture.organization().await;
    let draft = app.draft(organization, "user eve", "try", "late");
    fixture.store.commit(Batch::new().audit(draft)).await.unwrap();
    let mut numbers = vec![];
    loop {
        let records = app.read_export(&mut export).await.unwrap();
        if records.is_empty() {
            break;
        }
        numbers.extend(records.iter().map(|record| record.sequence));
    }
    assert_eq!(numbers, (before + 3..=before + 150).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_export_that_finds_the_end_missing_does_not_end_as_if_it_were_whole() {
    let (fixture, before) = fixture(10).await;
    let app = &fixture.app;
    let mut export = app.export_audit(&fixture.owner, ORGANIZATION, 1).await.unwrap();
    // The head tells of three more.
    export.last += 3;
    let mut last = 0;
    let error = loop {
        match app.read_export(&mut export).await {
            Ok(records) => last = records.last().expect("it is not at its end").sequence,
            Err(error) => break error,
        }
    };
    assert_eq!((last, error.reason()), (before + 10, latchkey_proto::v1::Reason::Internal));
}

#[test]
fn who_comes_by_a_damaged_record_is_told_its_number() {
    let organization = OrganizationId::from_bytes([1; 16]);
    let error = unread(StoreError::Damaged { key: keys::audit(organization, 4097) });
    assert!(error.message().contains("the audit record 4097 is damaged"), "{error}");
    assert!(error.cause().is_some());
    let error = unread(StoreError::Damaged { key: keys::audit_head(organization) });
    assert!(!error.message().contains("damaged"), "{error}");
}
