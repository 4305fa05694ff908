//! The hostile runner: a real certificate, the real protocol over mTLS, and no manners. Whatever
//! it says is refused with a reason, changes nothing current, costs bounded memory, and does not
//! keep an honest runner from its work.

mod bounds;
mod scene;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use latchkey_harness::simulated_runner::{Identity, SimulatedRunner};
use latchkey_harness::{LIMIT, Stage, wait_for};
use latchkey_proto::v1::lease_request::Frame as Request;
use latchkey_proto::v1::lease_response::Frame as Response;
use latchkey_proto::v1::upload_artifact_request::Part;
use latchkey_proto::v1::{self, ArtifactKind, Phase, RunState};
use tokio_stream::StreamExt;
use tonic::Code;

use self::scene::{
    Raw, Scene, append, check_refused, chunk, header, hello, send_parts, sha256, upload,
};

const STRANGER: &str = "01890000-0000-7000-8000-000000000001";

/// Leases that are not the hostile runner's, by name.
fn forged(lease: &v1::LeaseRef) -> Vec<(&'static str, v1::LeaseRef)> {
    let with = |change: &dyn Fn(&mut v1::LeaseRef)| {
        let mut forged = lease.clone();
        change(&mut forged);
        forged
    };
    vec![
        ("another runner's lease", lease.clone()),
        ("an old epoch", with(&|lease| lease.epoch -= 1)),
        ("the next epoch", with(&|lease| lease.epoch += 1)),
        ("the last of all epochs", with(&|lease| lease.epoch = u64::MAX)),
        ("no generation", with(&|lease| lease.generation = 0)),
        ("the next generation", with(&|lease| lease.generation += 1)),
        ("the other phase", with(&|lease| lease.phase = Phase::Apply.into())),
        ("a run that is not there", with(&|lease| STRANGER.clone_into(&mut lease.run_id))),
    ]
}

fn failed(lease: v1::LeaseRef) -> v1::Finished {
    let failed = v1::JobFailed {
        reason: "forged".into(),
        kind: v1::JobFailure::Errored.into(),
        exit_code: None,
    };
    v1::Finished {
        lease: Some(lease),
        log_length: 0,
        result: Some(v1::finished::Result::Failed(failed)),
    }
}

#[tokio::test]
async fn forged_leases_are_refused_and_change_nothing() {
    let mut scene = Scene::new().await.unwrap();
    let before = scene.stage.owner.audit_records("").await.unwrap();
    for (what, lease) in forged(&scene.lease.clone()) {
        let some = Some(lease.clone());
        // A generation that is still to come ends the stream; one is opened for each.
        let mut raw = Raw::welcomed(&scene.client).await.unwrap();
        for frame in [
            Request::Accept(v1::Accept { lease: some.clone() }),
            Request::NeverStarted(v1::NeverStarted { lease: some.clone() }),
            Request::Decline(v1::Decline { lease: some.clone(), reason: "forged".into() }),
            Request::Starting(v1::Starting { lease: some.clone() }),
            Request::Again(v1::Again { lease: some.clone() }),
            Request::Finished(failed(lease.clone())),
            Request::Heartbeat(v1::Heartbeat { held: vec![lease.clone()] }),
        ] {
            raw.send(Some(frame)).await;
        }
        let mut revoked = 0;
        loop {
            match raw.next().await {
                Ok(Response::Revoke(revoke)) => {
                    assert_eq!(revoke.lease, some, "{what}");
                    revoked += 1;
                }
                Ok(Response::Renewed(renewed)) => {
                    assert!(renewed.lease.is_empty(), "{what}: {renewed:?}");
                    if revoked == 3 {
                        break;
                    }
                    raw.send(Some(Request::Heartbeat(v1::Heartbeat { held: vec![] }))).await;
                }
                Ok(Response::Drain(_) | Response::Resume(_)) => {}
                Ok(other) => panic!("{what} was answered {other:?}"),
                Err(status) => {
                    assert_eq!(status.code(), Code::FailedPrecondition, "{what}: {status:?}");
                    break;
                }
            }
        }
        scene.honest_goes_on().await.unwrap_or_else(|error| panic!("after {what}: {error:#}"));

        let mut client = scene.client.clone();
        for kind in [ArtifactKind::Configuration, ArtifactKind::Workspace, ArtifactKind::State] {
            let request = v1::FetchArtifactRequest { lease: some.clone(), kind: kind.into() };
            let answer = client.fetch_artifact(request).await;
            assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition, "{what}");
        }
        for kind in [
            ArtifactKind::Workspace,
            ArtifactKind::Changes,
            ArtifactKind::State,
            ArtifactKind::ErroredState,
        ] {
            let answer =
                upload(&mut client, header(&lease, kind, b"{}"), vec![b"{}".to_vec()]).await;
            // What is said of before a restore is kept for a person, within bounds.
            let kept = answer.as_ref().is_ok_and(|answer| answer.quarantined);
            let may_be_kept = what == "no generation";
            assert!(answer.is_err() || (kept && may_be_kept), "{what}: {kind:?}: {answer:?}");
        }
        let answer = append(&mut client, vec![chunk(Some(&lease), 0, b"{}\n")]).await;
        assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition, "{what}");
        scene.honest_goes_on().await.unwrap_or_else(|error| panic!("after {what}: {error:#}"));
    }
    // A lease that it says it holds when it comes is given up.
    let held = vec![scene.lease.clone()];
    let mut raw = Raw::open(&scene.client, Some(Request::Hello(v1::Hello { held, ..hello() })))
        .await
        .unwrap();
    let Response::Welcome(welcome) = raw.next().await.unwrap() else { panic!("no welcome") };
    assert!(welcome.keep.is_empty(), "{welcome:?}");
    assert_eq!(welcome.give_up, [scene.lease.clone()]);

    scene.honest_goes_on().await.unwrap();
    let run = scene.honest_finishes().await.unwrap();
    assert_eq!(run.state(), RunState::AwaitingConfirmation);
    // What was refused changed nothing, so nothing but the honest runner's work is told.
    let after = scene.stage.owner.audit_records("").await.unwrap();
    let told: Vec<&str> = after
        .iter()
        .filter(|record| before.iter().all(|earlier| earlier.sequence != record.sequence))
        .map(|record| record.action.as_str())
        .collect();
    assert!(told.contains(&"finish_plan"), "{told:?}");
    assert!(told.iter().all(|action| ["finish_plan", "quarantine"].contains(action)), "{told:?}");
    assert!(
        scene
            .stage
            .owner
            .audit_records("")
            .await
            .unwrap()
            .iter()
            .any(|record| { record.action == "enroll_runner" })
    );
    scene.stage.owner.verify_audit().await.unwrap();
}

#[tokio::test]
async fn malformed_frames_end_the_stream_with_a_reason() {
    let mut scene = Scene::new().await.unwrap();
    let lease = scene.lease.clone();
    let malformed = |change: &dyn Fn(&mut v1::LeaseRef)| {
        let mut lease = lease.clone();
        change(&mut lease);
        Some(lease)
    };
    let many: Vec<_> = (0..300).map(|_| lease.clone()).collect();
    let firsts = [
        ("nothing in the first frame", None),
        ("a first frame that is no hello", Some(Request::Accept(v1::Accept { lease: None }))),
        ("no slots", Some(Request::Hello(v1::Hello { slots: 0, ..hello() }))),
        ("257 slots", Some(Request::Hello(v1::Hello { slots: 257, ..hello() }))),
        ("all slots", Some(Request::Hello(v1::Hello { slots: u32::MAX, ..hello() }))),
        ("300 held leases", Some(Request::Hello(v1::Hello { held: many.clone(), ..hello() }))),
        (
            "a held lease without a run",
            Some(Request::Hello(v1::Hello { held: vec![v1::LeaseRef::default()], ..hello() })),
        ),
    ];
    for (what, first) in firsts {
        let status = match Raw::open(&scene.client, first).await {
            Ok(mut raw) => raw.end().await,
            Err(status) => status,
        };
        check_refused(what, Err::<(), _>(status), Code::InvalidArgument, "FIELD_INVALID");
    }
    let later = [
        ("an empty frame", None),
        ("a second hello", Some(Request::Hello(hello()))),
        ("no lease", Some(Request::Starting(v1::Starting { lease: None }))),
        (
            "an id that is none",
            Some(Request::Starting(v1::Starting {
                lease: malformed(&|lease| lease.run_id = "../../etc".into()),
            })),
        ),
        (
            "an unknown phase",
            Some(Request::Starting(v1::Starting { lease: malformed(&|lease| lease.phase = 99) })),
        ),
        (
            "no phase",
            Some(Request::Again(v1::Again { lease: malformed(&|lease| lease.phase = 0) })),
        ),
        ("300 held leases", Some(Request::Heartbeat(v1::Heartbeat { held: many }))),
        (
            "a result that is none",
            Some(Request::Finished(v1::Finished { result: None, ..failed(lease.clone()) })),
        ),
        (
            "an unknown kind of failure",
            Some(Request::Finished(v1::Finished {
                result: Some(v1::finished::Result::Failed(v1::JobFailed {
                    kind: 77,
                    ..Default::default()
                })),
                ..failed(lease.clone())
            })),
        ),
        (
            "digests that are none",
            Some(Request::Finished(v1::Finished {
                result: Some(v1::finished::Result::Plan(v1::PlanFinished::default())),
                ..failed(lease.clone())
            })),
        ),
    ];
    for (what, frame) in later {
        let mut raw = Raw::welcomed(&scene.client).await.unwrap();
        raw.send(frame).await;
        let status = raw.end().await;
        check_refused(what, Err::<(), _>(status), Code::InvalidArgument, "FIELD_INVALID");
    }
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn huge_frames_are_refused_and_leave_no_memory_behind() {
    let mut scene = Scene::new().await.unwrap();
    let before = scene.memory().unwrap();
    let labels: HashMap<String, String> =
        (0..50_000).map(|n| (format!("label-{n}"), "x".repeat(100))).collect();
    let host = v1::HostFacts { kernel: "h".repeat(5 << 20), ..Default::default() };
    let frames = [
        ("5 MB of labels", v1::Hello { labels, ..hello() }),
        ("5 MB of host", v1::Hello { host: Some(host), ..hello() }),
        ("5 MB of version", v1::Hello { version: "v".repeat(5 << 20), ..hello() }),
    ];
    for (what, frame) in frames {
        for _ in 0..10 {
            let status = match Raw::open(&scene.client, Some(Request::Hello(frame.clone()))).await {
                Ok(mut raw) => raw.end().await,
                Err(status) => status,
            };
            assert_eq!(status.code(), Code::OutOfRange, "{what}: {status:?}");
        }
    }
    // What is within a frame's limit but absurd is cut short or refused, and not kept.
    for _ in 0..20 {
        let engines = (0..20_000)
            .map(|n| v1::Engine { name: format!("engine-{n}"), version: "1".repeat(40) })
            .collect();
        let hello = v1::Hello { engines, version: "v".repeat(1 << 20), ..hello() };
        let opened = Raw::open(&scene.client, Some(Request::Hello(hello))).await;
        if let Ok(mut raw) = opened {
            let _ = raw.next().await;
        }
    }
    scene.honest_goes_on().await.unwrap();
    let grown = scene.memory().unwrap().saturating_sub(before);
    assert!(grown < 48 << 20, "the control plane has grown by {} MiB", grown >> 20);
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn a_log_takes_what_continues_it_and_nothing_else() {
    let mut scene = Scene::new().await.unwrap();
    let (lease, mut client) = (scene.lease.clone(), scene.honest.client.clone());
    let log = b"{\"@message\":\"honest\"}\n";
    let end = log.len() as u64;
    assert_eq!(append(&mut client, vec![chunk(Some(&lease), 0, log)]).await.unwrap(), end);
    let big = vec![b'x'; (256 << 10) + 1];
    for (what, chunks, code, named) in [
        (
            "a gap",
            vec![chunk(Some(&lease), end + 1, b"{}\n")],
            Code::FailedPrecondition,
            "LOG_OFFSET",
        ),
        (
            "the end of all offsets",
            vec![chunk(Some(&lease), u64::MAX, b"{}\n")],
            Code::FailedPrecondition,
            "LOG_OFFSET",
        ),
        (
            "other bytes than are there",
            vec![chunk(Some(&lease), 0, b"{\"@message\":\"forged\"}\n")],
            Code::InvalidArgument,
            "FIELD_INVALID",
        ),
        ("no lease", vec![chunk(None, end, b"{}\n")], Code::InvalidArgument, "FIELD_INVALID"),
        (
            "zero bytes",
            vec![chunk(Some(&lease), end, b"{\"a\":\"\0\"}\n")],
            Code::InvalidArgument,
            "FIELD_INVALID",
        ),
        (
            "more than a message holds",
            vec![chunk(Some(&lease), end, &big)],
            Code::InvalidArgument,
            "FIELD_INVALID",
        ),
        ("5 MB", vec![chunk(Some(&lease), end, &vec![b'x'; 5 << 20])], Code::OutOfRange, ""),
    ] {
        let mut client = client.clone().max_encoding_message_size(usize::MAX);
        check_refused(what, append(&mut client, chunks).await, code, named);
    }
    // Repeats and overlaps of what is there are acknowledged.
    for chunks in [
        vec![chunk(Some(&lease), 0, log)],
        vec![chunk(Some(&lease), 0, log), chunk(None, 5, &log[5..])],
        vec![chunk(Some(&lease), 3, &log[3..])],
    ] {
        assert_eq!(append(&mut client, chunks).await.unwrap(), end);
    }
    assert_eq!(scene.stage.owner.read_log(&lease.run_id, Phase::Plan).await.unwrap(), log);
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn uploads_are_what_their_header_says_or_leave_nothing() {
    let mut scene = Scene::new().await.unwrap();
    let (lease, mut client) = (scene.lease.clone(), scene.honest.client.clone());
    let data = b"{}".to_vec();
    let told = |change: &dyn Fn(&mut v1::ArtifactHeader)| {
        let mut header = header(&lease, ArtifactKind::Changes, &data);
        change(&mut header);
        Some(Part::Header(header))
    };
    let fine = Some(Part::Data(data.clone()));
    let invalid = (Code::InvalidArgument, "FIELD_INVALID");
    for (what, parts, (code, named)) in [
        (
            "another digest",
            vec![told(&|h| h.digest = sha256(b"other")), fine.clone()],
            (Code::InvalidArgument, "DIGEST_MISMATCH"),
        ),
        ("no digest", vec![told(&|h| h.digest = "none".into()), fine.clone()], invalid),
        ("less than announced", vec![told(&|h| h.size = 3), fine.clone()], invalid),
        ("more than announced", vec![told(&|h| h.size = 1), fine.clone()], invalid),
        (
            "more than there may be",
            vec![told(&|h| h.size = u64::MAX), fine.clone()],
            (Code::ResourceExhausted, "LIMIT_REACHED"),
        ),
        ("data before the header", vec![fine.clone()], invalid),
        ("nothing", vec![], invalid),
        ("an empty part", vec![told(&|_| {}), None], invalid),
        ("two headers", vec![told(&|_| {}), told(&|_| {})], invalid),
        ("no kind", vec![told(&|h| h.kind = 0), fine.clone()], invalid),
        ("an unknown kind", vec![told(&|h| h.kind = 99), fine.clone()], invalid),
        (
            "a kind of the control plane's",
            vec![told(&|h| h.kind = ArtifactKind::Configuration.into()), fine.clone()],
            invalid,
        ),
        (
            "what the other phase makes",
            vec![told(&|h| h.kind = ArtifactKind::State.into()), fine.clone()],
            invalid,
        ),
        ("no lease", vec![told(&|h| h.lease = None), fine.clone()], invalid),
    ] {
        check_refused(what, send_parts(&mut client, parts).await, code, named);
    }
    // An endless one is cut as soon as it is longer than it said.
    let endless = std::iter::once(told(&|h| h.size = 1 << 20))
        .chain(std::iter::repeat_with(|| Some(Part::Data(vec![7; 256 << 10]))).take(100_000));
    let parts = endless.map(|part| v1::UploadArtifactRequest { part });
    let answer = client.upload_artifact(tokio_stream::iter(parts)).await;
    check_refused("an endless upload", answer, Code::InvalidArgument, "FIELD_INVALID");

    let temporary = scene.stage.plane.data_dir().join("blobs").join("temporary");
    wait_for("drafts to be gone", LIMIT, async || {
        let left = std::fs::read_dir(&temporary).map_or(0, Iterator::count);
        if left == 0 { Ok(()) } else { Err(format!("{left} drafts")) }
    })
    .await
    .unwrap();
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn floods_cost_bounded_memory_and_hold_nobody_up() {
    let mut scene = Scene::new().await.unwrap();
    let before = scene.memory().unwrap();
    // Heartbeats as fast as they are taken, and nobody who reads the answers.
    let flood = Raw::welcomed(&scene.client).await.unwrap();
    for _ in 0..20_000 {
        let held = vec![scene.lease.clone(); 50];
        let frame = v1::LeaseRequest { frame: Some(Request::Heartbeat(v1::Heartbeat { held })) };
        if flood.frames.try_send(frame).is_err() {
            tokio::task::yield_now().await;
        }
    }
    scene.honest_goes_on().await.unwrap();
    // Hellos: each stream takes over from the one before it.
    let mut streams = vec![];
    for _ in 0..200 {
        streams.push(Raw::welcomed(&scene.client).await.unwrap());
    }
    scene.honest_goes_on().await.unwrap();
    let ended = streams[0].end().await;
    assert_eq!(ended.code(), Code::Aborted, "{ended:?}");
    drop((flood, streams));
    // Thousands of streams that never say a word, over many connections.
    let mut silent = vec![];
    for _ in 0..8 {
        let client = Scene::connect(&scene.listener, &scene.identity).await.unwrap();
        for _ in 0..250 {
            let mut client = client.clone();
            silent.push(tokio::spawn(async move {
                let nothing = tokio_stream::pending::<v1::LeaseRequest>();
                let _ = client.lease(nothing).await;
            }));
        }
    }
    scene.honest_goes_on().await.unwrap();
    let grown = scene.memory().unwrap().saturating_sub(before);
    silent.iter().for_each(tokio::task::JoinHandle::abort);
    assert!(grown < 96 << 20, "the control plane has grown by {} MiB", grown >> 20);
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn who_held_a_job_before_fills_no_disk_with_what_it_brings() {
    let mut scene = Scene::new().await.unwrap();
    // It hands the job back, which goes to another; from now on it is hostile.
    let token = scene.stage.owner.pool_token(Stage::POOL).await.unwrap();
    let channel = scene.listener.endpoint(None).unwrap().connect().await.unwrap();
    let identity = Identity::enroll(channel, &token, "second").await.unwrap();
    let mut second = SimulatedRunner::connect(&scene.listener, &identity, 1).await.unwrap();
    let old = scene.lease.clone();
    let handed = v1::NeverStarted { lease: Some(old.clone()) };
    scene.honest.send(Request::NeverStarted(handed)).await.unwrap();
    let (lease, _) = second.offer().await.unwrap();
    assert_eq!(lease.epoch, old.epoch + 1);
    second.start(&lease).await.unwrap();
    let mut client = std::mem::replace(&mut scene.honest, second).client.clone();
    scene.lease = lease;

    let answer = append(&mut client, vec![chunk(Some(&old), 0, b"{}\n")]).await;
    check_refused("a line of before", answer, Code::FailedPrecondition, "LEASE_LOST");
    for number in 0..60 {
        let mut data = vec![b'x'; 1 << 20];
        data[..8].copy_from_slice(&u64::to_be_bytes(number));
        let mut header = header(&old, ArtifactKind::Log, &data);
        header.sequence = number;
        let parts = data.chunks(256 << 10).map(<[u8]>::to_vec).collect();
        let answer = upload(&mut client, header, parts).await;
        assert!(answer.is_err() || answer.unwrap().quarantined, "it became current");
    }
    let blobs = scene.stage.plane.data_dir().join("blobs");
    wait_for("what was replaced to be gone", LIMIT, async || {
        let size = size_of(&blobs);
        if size < 8 << 20 { Ok(()) } else { Err(format!("{} MiB", size >> 20)) }
    })
    .await
    .unwrap();
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

#[tokio::test]
async fn a_revoked_runner_is_cut_off_at_once_and_for_good() {
    let mut scene = Scene::new().await.unwrap();
    let mut raw = Raw::welcomed(&scene.client).await.unwrap();
    let runner = scene.stage.owner.wait_for_runner("hostile").await.unwrap();
    let request = v1::RevokeRunnerRequest { runner_id: runner.runner_id };
    scene.stage.owner.pools().revoke_runner(request).await.unwrap();
    assert_eq!(raw.end().await.code(), Code::Unauthenticated);
    let mut client = scene.client.clone();
    let lease = scene.lease.clone();
    for (what, code) in [
        ("a new stream", Raw::welcomed(&client).await.err().map(|status| status.code())),
        (
            "a line",
            append(&mut client, vec![chunk(Some(&lease), 0, b"{}\n")])
                .await
                .err()
                .map(|s| s.code()),
        ),
        (
            "an upload",
            upload(&mut client, header(&lease, ArtifactKind::Log, b"x"), vec![b"x".to_vec()])
                .await
                .err()
                .map(|status| status.code()),
        ),
    ] {
        assert_eq!(code, Some(Code::Unauthenticated), "{what}");
    }
    let records = scene.stage.owner.audit_records("").await.unwrap();
    assert!(records.iter().any(|record| record.action == "revoke_runner"));
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

/// Only what a control plane once said itself proves that it runs on an old copy: else one runner
/// could stop everybody.
#[tokio::test]
async fn a_runner_that_lies_about_history_stops_nobody() {
    let mut scene = Scene::new().await.unwrap();
    let seen = Some(v1::HistoryMark {
        generation: 99,
        incarnation: "ab".repeat(16),
        history: u64::MAX,
        mac: vec![7; 32],
    });
    let lie = v1::Hello { seen, ..hello() };
    let _ = Raw::open(&scene.client, Some(Request::Hello(lie))).await;
    let records = scene.stage.owner.audit_records("").await.unwrap();
    assert!(records.iter().all(|record| record.action != "prove_old_copy"), "{records:?}");
    scene.honest_goes_on().await.unwrap();
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}

/// Bytes of all files below a directory.
fn size_of(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => size_of(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

/// The first half of a message: a length that promises more, and bytes that never end.
async fn half_sent(scene: &Scene, method: &str, promised: u32, sent: usize) -> Vec<Code> {
    // Whoever enrols has no certificate yet.
    let identity = (method != "Enroll").then_some(&scene.identity);
    let client = scene.listener.endpoint(identity).unwrap().connect().await.unwrap();
    let path = format!("https://runners/latchkey.v1.RunnerService/{method}");
    let half = move || {
        let mut start = vec![0];
        start.extend_from_slice(&promised.to_be_bytes());
        let rest = std::iter::repeat_n(vec![b'x'; 32 << 10], sent >> 15);
        let parts = std::iter::once(start).chain(rest).map(Ok::<_, std::io::Error>);
        tokio_stream::iter(parts).chain(tokio_stream::pending())
    };
    let mut codes = vec![];
    for _ in 0..100 {
        let request = tonic::codegen::http::Request::builder()
            .method("POST")
            .uri(&path)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(tonic::body::Body::new(axum::body::Body::from_stream(half())))
            .unwrap();
        let mut client = client.clone();
        codes.push(tokio::spawn(async move {
            let ready = tower::ServiceExt::ready(&mut client).await.ok()?;
            let answer = tower::Service::call(ready, request).await.ok()?;
            let code = answer.headers().get("grpc-status")?.to_str().ok()?.parse::<i32>().ok()?;
            Some(Code::from_i32(code))
        }));
    }
    // What is answered at all is answered at once; the others wait for their other half.
    let mut answered = vec![];
    let until = tokio::time::Instant::now() + Duration::from_secs(3);
    for code in codes {
        let abort = code.abort_handle();
        match tokio::time::timeout_at(until, code).await {
            Ok(Ok(code)) => answered.extend(code),
            Ok(Err(_)) | Err(_) => abort.abort(),
        }
    }
    answered
}

#[tokio::test]
async fn half_sent_frames_cost_bounded_memory() {
    let mut scene = Scene::new().await.unwrap();
    let before = scene.memory().unwrap();
    // A length above the limit is refused before its bytes come.
    let codes = half_sent(&scene, "Lease", 4 << 20, 3 << 20).await;
    assert!(codes.contains(&Code::OutOfRange), "{codes:?}");
    for method in ["Lease", "AppendLog", "UploadArtifact"] {
        half_sent(&scene, method, 1 << 20, 900 << 10).await;
        scene.honest_goes_on().await.unwrap();
    }
    // Of strangers, small messages alone are waited for, and few of them at a time.
    let codes = half_sent(&scene, "Enroll", 1 << 20, 900 << 10).await;
    assert!(codes.contains(&Code::OutOfRange), "{codes:?}");
    let codes = half_sent(&scene, "Enroll", 60 << 10, 32 << 10).await;
    assert!(codes.contains(&Code::ResourceExhausted), "{codes:?}");
    scene.honest_goes_on().await.unwrap();
    let grown = scene.memory().unwrap().saturating_sub(before);
    assert!(grown < 256 << 20, "the control plane has grown by {} MiB", grown >> 20);
    assert_eq!(scene.honest_finishes().await.unwrap().state(), RunState::AwaitingConfirmation);
}
