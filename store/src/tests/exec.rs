//! Exec grants: single use in log order, bounded in time and number, and gone for everybody but their principal.

use super::world::*;
use crate::Views;
use holdfast_model::exec::{ExecClass, ExecEnd, ExecGrant};
use holdfast_model::limits::{
    EXEC_ENV_MAX, EXEC_INSTANCE_MAX, EXEC_ORG_HOUR_MAX, EXEC_SESSION_MS_MAX, EXEC_SESSION_MS_MIN,
    EXEC_SILENCE_MS, EXEC_USE_WITHIN_MS_MAX,
};
use holdfast_model::resource::{Instance, TokenKind};
use holdfast_model::*;

const SESSION_MS: u64 = 600_000;

/// A tenant whose env runs.
struct Scene {
    world: World,
    tenant: Tenant,
    instances: Vec<Instance>,
}

fn scene() -> Scene {
    let mut world = World::new();
    world.node("n1", 4_096);
    let tenant = world.tenant("acme", 10);
    let release = world.release(&tenant, 1);
    world.deploy(&tenant, release);
    world.settle(tenant.env);
    let instances = world.live(tenant.env);
    Scene { world, tenant, instances }
}

pub(super) fn create(instance: InstanceId, digest: u8) -> Command {
    Command::CreateExecGrant {
        instance,
        class: ExecClass::Program,
        terminal: false,
        digest: Digest([digest; 32]),
        use_within_ms: EXEC_USE_WITHIN_MS_MAX,
        session_ms: SESSION_MS,
    }
}

pub(super) fn use_up(grant: ExecGrantId, digest: u8) -> Command {
    Command::UseExecGrant {
        grant,
        digest: Digest([digest; 32]),
        class: ExecClass::Program,
        terminal: false,
        member: MemberId(1),
    }
}

pub(super) fn end(grant: ExecGrantId, end: ExecEnd) -> Command {
    Command::EndExecGrant { grant, end, code: (end == ExecEnd::Exited).then_some(7), lasted_ms: 1_234 }
}

impl Scene {
    fn instance(&self) -> InstanceId {
        self.instances[0].id
    }

    fn granted(&mut self, digest: u8) -> ExecGrantId {
        let made = self.world.tenant_asks(&self.tenant, create(self.instance(), digest)).unwrap();
        let Output::ExecGrant(id) = made.output else { panic!("no grant") };
        id
    }

    fn grant(&self, id: ExecGrantId) -> Option<ExecGrant> {
        self.world.view().exec_grant(id).unwrap()
    }

    fn last_event(&self) -> Event {
        let view = self.world.view();
        view.event(view.revision()).unwrap().unwrap()
    }
}

#[test]
fn i11_a_grant_is_good_for_one_use_in_log_order() {
    let mut s = scene();
    let id = s.granted(1);
    assert!(s.grant(id).unwrap().used.is_none());
    s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap();
    let used = s.grant(id).unwrap().used.unwrap();
    assert_eq!((used.at, used.ends_at), (s.world.now, s.world.now.plus_ms(SESSION_MS)));
    let refused = s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
    assert!(refused.message.contains("used already"), "{refused}");
    // Nor after its end, when it is gone.
    s.world.system(end(id, ExecEnd::Exited)).unwrap();
    assert_eq!(code(s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1))), Code::NotFound);
    assert_eq!(s.grant(id), None);
    s.world.check();
}

#[test]
fn i11_a_grant_that_was_not_used_in_time_is_over() {
    let mut s = scene();
    let id = s.granted(1);
    s.world.now = s.world.now.plus_ms(EXEC_USE_WITHIN_MS_MAX - 1);
    let early = s.granted(2);
    s.world.tenant_asks(&s.tenant.clone(), use_up(early, 2)).unwrap();
    s.world.now = s.world.now.plus_ms(1);
    let refused = s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
    assert!(refused.message.contains("not used in time"), "{refused}");
    // The clockwork takes it away, and says why.
    s.world.tick_after(0);
    assert_eq!(s.grant(id), None);
    let EventPayload::ExecEnded { grant, end, code: None, lasted_ms: 0 } = s.last_event().payload else {
        panic!("{:?}", s.last_event())
    };
    assert_eq!((grant, end), (id, ExecEnd::ConnectTimeout));
    assert!(s.grant(early).is_some());
    s.world.check();
}

#[test]
fn i11_a_session_whose_member_is_silent_ends_after_its_time() {
    let mut s = scene();
    let id = s.granted(1);
    s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap();
    s.world.tick_after(SESSION_MS + EXEC_SILENCE_MS - 1);
    assert!(s.grant(id).is_some(), "its member may still say how it ended");
    s.world.tick_after(1);
    assert_eq!(s.grant(id), None);
    assert!(matches!(
        s.last_event().payload,
        EventPayload::ExecEnded { end: ExecEnd::Lost, lasted_ms: SESSION_MS, .. }
    ));
    s.world.check();
}

#[test]
fn i09_a_grant_is_its_principals_alone() {
    let mut s = scene();
    let other = s.world.tenant("other", 11);
    let absent = code(s.world.tenant_asks(&other, create(InstanceId::from_bits(1), 9)));
    assert_eq!(absent, Code::NotFound);
    let theirs = s.world.tenant_asks(&other, create(s.instance(), 9)).unwrap_err();
    let nothing = s.world.tenant_asks(&other, create(InstanceId::from_bits(1), 9)).unwrap_err();
    assert_eq!(theirs, nothing, "the same bytes for what is another's and what is not there");

    let id = s.granted(1);
    let absent = s.world.tenant_asks(&other, use_up(ExecGrantId::from_bits(1), 1)).unwrap_err();
    assert_eq!(s.world.tenant_asks(&other, use_up(id, 1)).unwrap_err(), absent);
    assert_eq!(s.world.tenant_asks(&other, end(id, ExecEnd::Revoked)).unwrap_err().code, Code::NotFound);
    // Another token of the same org, and an operator: neither is who it was given to.
    let second = Command::CreateToken(token(12, TokenKind::Org(s.tenant.org), &[Scope::ExecCreate]));
    let Output::Token(second) = s.world.operator(second).unwrap().output else { panic!("no token") };
    let colleague = Tenant { token: second, ..s.tenant };
    assert_eq!(s.world.tenant_asks(&colleague, use_up(id, 1)).unwrap_err(), absent);
    assert_eq!(s.world.operator(use_up(id, 1)).unwrap_err(), absent);
    // And a wrong secret is nobody's.
    assert_eq!(s.world.tenant_asks(&s.tenant.clone(), use_up(id, 2)).unwrap_err(), absent);
    s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap();
    s.world.check();
}

#[test]
fn i11_a_revoked_token_neither_gets_nor_uses_a_grant() {
    let mut s = scene();
    let id = s.granted(1);
    s.world.operator(Command::RevokeToken { token: s.tenant.token }).unwrap();
    assert_eq!(code(s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1))), Code::Unauthenticated);
    let again = create(s.instance(), 2);
    assert_eq!(code(s.world.tenant_asks(&s.tenant.clone(), again)), Code::Unauthenticated);
    assert!(s.grant(id).unwrap().used.is_none());
}

#[test]
fn i11_i12_somebody_else_ends_a_session_by_revoking_it_whatever_they_say() {
    let mut s = scene();
    let id = s.granted(1);
    s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap();
    s.world.now = s.world.now.plus_ms(5_000);
    // A tenant does not get to write that the program exited.
    s.world.tenant_asks(&s.tenant.clone(), end(id, ExecEnd::Exited)).unwrap();
    let event = s.last_event();
    let expected = EventPayload::ExecEnded { grant: id, end: ExecEnd::Revoked, code: None, lasted_ms: 5_000 };
    assert_eq!(event.payload, expected);
    assert_eq!((event.actor, event.org), (Actor::Token(s.tenant.token), Some(s.tenant.org)));
    // What its member says after that changes nothing.
    let revision = s.world.store.revision();
    s.world.system(end(id, ExecEnd::Exited)).unwrap();
    assert_eq!(s.world.store.revision(), revision);
    s.world.check();
}

#[test]
fn i12_begin_use_and_end_are_events_of_one_aggregate_that_name_who_where_and_how() {
    let mut s = scene();
    let before = s.world.store.revision();
    let id = s.granted(1);
    s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap();
    s.world.system(end(id, ExecEnd::Exited)).unwrap();
    let events = s.world.view().events(before, 100, Some(s.tenant.org)).unwrap().events;
    let kinds: Vec<_> = events.iter().map(|e| (e.payload.kind(), e.aggregate, e.aggregate_seq)).collect();
    let aggregate = Aggregate::ExecGrant(id);
    assert_eq!(
        kinds,
        [("exec_granted", aggregate, 1), ("exec_started", aggregate, 2), ("exec_ended", aggregate, 3)]
    );
    assert_eq!(events[0].actor, Actor::Token(s.tenant.token));
    let EventPayload::ExecGranted(grant) = &events[0].payload else { panic!("{:?}", events[0]) };
    assert_eq!((grant.instance, grant.principal), (s.instance(), Actor::Token(s.tenant.token)));
    let ended = EventPayload::ExecEnded { grant: id, end: ExecEnd::Exited, code: Some(7), lasted_ms: 1_234 };
    assert_eq!(events[2].payload, ended);
}

#[test]
fn grants_are_bounded_per_instance_env_and_hour() {
    let mut s = scene();
    for n in 0..EXEC_INSTANCE_MAX as u8 {
        s.granted(n);
    }
    let tenant = s.tenant;
    let refused = s.world.tenant_asks(&tenant, create(s.instance(), 9)).unwrap_err();
    assert_eq!(refused.code, Code::QuotaExceeded);
    assert!(refused.message.contains("of 2 exec sessions of an instance"), "{refused}");
    // One that is over no longer counts, though no tick took it away yet.
    s.world.now = s.world.now.plus_ms(EXEC_USE_WITHIN_MS_MAX);
    s.granted(9);
    s.world.tick_after(EXEC_USE_WITHIN_MS_MAX);

    s.world.tenant_asks(&tenant, Command::Scale { env: tenant.env, counts: counts(6) }).unwrap();
    s.world.settle(tenant.env);
    let instances = s.world.live(tenant.env);
    for n in 0..EXEC_ENV_MAX {
        s.world.tenant_asks(&tenant, create(instances[n / 2].id, 20 + n as u8)).unwrap();
    }
    let refused = s.world.tenant_asks(&tenant, create(instances[5].id, 9)).unwrap_err();
    assert!(refused.message.contains("of 10 exec sessions of an env"), "{refused}");

    let so_far = s.world.view().exec_hour(tenant.org).unwrap().grants;
    s.world.tick_after(EXEC_USE_WITHIN_MS_MAX);
    for n in so_far..EXEC_ORG_HOUR_MAX {
        let made = s.world.tenant_asks(&tenant, create(instances[0].id, n as u8)).unwrap();
        let Output::ExecGrant(id) = made.output else { panic!("no grant") };
        s.world.system(end(id, ExecEnd::Lost)).unwrap();
    }
    let refused = s.world.tenant_asks(&tenant, create(instances[0].id, 9)).unwrap_err();
    assert_eq!(refused.code, Code::QuotaExceeded);
    assert!(refused.message.contains("in an hour"), "{refused}");
    s.world.now = s.world.now.plus_ms(3_600_000);
    s.world.tenant_asks(&tenant, create(instances[0].id, 9)).unwrap();
    s.world.check();
}

#[test]
fn i14_grants_that_make_no_sense_are_refused() {
    let mut s = scene();
    let (tenant, instance) = (s.tenant, s.instance());
    let with = |use_within_ms, session_ms| Command::CreateExecGrant {
        instance,
        class: ExecClass::Shell,
        terminal: true,
        digest: Digest([3; 32]),
        use_within_ms,
        session_ms,
    };
    for bad in [
        with(0, SESSION_MS),
        with(EXEC_USE_WITHIN_MS_MAX + 1, SESSION_MS),
        with(1, EXEC_SESSION_MS_MIN - 1),
        with(1, EXEC_SESSION_MS_MAX + 1),
        with(1, u64::MAX),
    ] {
        assert_eq!(code(s.world.tenant_asks(&tenant, bad)), Code::InvalidRequest);
    }
    // A grant for a shell on a terminal is for nothing else.
    let made = s.world.tenant_asks(&tenant, with(1_000, SESSION_MS)).unwrap();
    let Output::ExecGrant(id) = made.output else { panic!("no grant") };
    assert_eq!(code(s.world.tenant_asks(&tenant, use_up(id, 3))), Code::FailedPrecondition);
    // The system is nobody's principal.
    assert_eq!(code(s.world.system(create(instance, 4))), Code::Unauthenticated);
    s.world.report(&s.instances[0].clone(), resource::InstanceState::Failed);
    assert_eq!(code(s.world.tenant_asks(&tenant, create(instance, 5))), Code::FailedPrecondition);
    s.world.check();
}

#[test]
fn i01_before_version_3_there_are_no_grants() {
    let mut world = World::at(ClusterVersion::TWO);
    let tenant = world.tenant("acme", 10);
    let refused = world.tenant_asks(&tenant, create(InstanceId::from_bits(1), 1)).unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
    assert!(refused.message.contains("at version 2"), "{refused}");
    world.system(Command::RaiseClusterVersion { to: ClusterVersion::THREE }).unwrap();
    assert_eq!(code(world.tenant_asks(&tenant, create(InstanceId::from_bits(1), 1))), Code::NotFound);
    world.check();
}

#[test]
fn i11_with_an_app_go_its_grants() {
    let mut s = scene();
    let id = s.granted(1);
    s.world.tenant_asks(&s.tenant.clone(), use_up(id, 1)).unwrap();
    let delete = Command::DeleteApp { app: s.tenant.app, expected_version: None };
    let before = s.world.store.revision();
    s.world.tenant_asks(&s.tenant.clone(), delete).unwrap();
    assert_eq!(s.grant(id), None);
    // Its end is in the history all the same (I12).
    let first = s.world.view().event(before.next()).unwrap().unwrap();
    let ended = EventPayload::ExecEnded { grant: id, end: ExecEnd::Revoked, code: None, lasted_ms: 0 };
    assert_eq!(first.payload, ended);
    s.world.system(end(id, ExecEnd::Revoked)).unwrap();
    s.world.check();
}
