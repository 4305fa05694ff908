//! The plan-aware part of the policy: a code for an apply by what its plan would do.
//!
//! The rule looks at [`PlanFacts`], which whoever reads a plan's changes derives once. A plan of
//! which nothing is known, or not all, matches every rule that demands anything: nothing here
//! fails open.

use std::collections::BTreeSet;
use std::fmt;

/// Demands a code for an apply by what its plan would do. Each part is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanRule {
    /// The plan destroys or replaces anything.
    pub destructive: bool,
    /// The plan changes a resource of one of these types; `*` at the end stands for anything.
    pub resource_types: BTreeSet<String>,
    /// The plan changes more resources than this.
    pub more_than: Option<u32>,
}

/// What a rule looks at of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanFacts {
    /// How many resources it changes in any way.
    pub changes: u32,
    /// The first resource that it destroys or replaces.
    pub destroys: Option<Destroys>,
    /// Types of the resources that it changes, at most [`PlanFacts::MOST_TYPES`].
    pub types: BTreeSet<String>,
    /// There are more types than are listed: any could be among them.
    pub more_types: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destroys {
    /// At most [`PlanFacts::LONGEST_ADDRESS`] bytes.
    pub address: String,
    pub by: DestroyedBy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyedBy {
    Destroying,
    Replacing,
}

/// Why a rule demands a code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    Destructive(Destroys),
    Type(String),
    /// There are too many types to tell.
    ManyTypes,
    Changes {
        changes: u32,
        more_than: u32,
    },
    /// What the plan would do is not known, or not whole.
    Unknown,
}

impl PlanRule {
    /// Tells whether there is nothing that it demands.
    pub fn is_empty(&self) -> bool {
        *self == PlanRule::default()
    }

    /// Answers why a plan needs a code by this rule, if it does. `None` is a plan of which the
    /// facts are not known.
    pub fn matches(&self, facts: Option<&PlanFacts>) -> Option<Match> {
        if self.is_empty() {
            return None;
        }
        let Some(facts) = facts else { return Some(Match::Unknown) };
        if self.destructive
            && let Some(destroys) = &facts.destroys
        {
            return Some(Match::Destructive(destroys.clone()));
        }
        if !self.resource_types.is_empty() {
            if let Some(found) = facts.types.iter().find(|name| self.names(name)) {
                return Some(Match::Type(found.clone()));
            }
            if facts.more_types {
                return Some(Match::ManyTypes);
            }
        }
        self.more_than
            .filter(|more_than| facts.changes > *more_than)
            .map(|more_than| Match::Changes { changes: facts.changes, more_than })
    }

    fn names(&self, name: &str) -> bool {
        self.resource_types.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(stem) => name.starts_with(stem),
            None => name == pattern,
        })
    }

    /// Tells whether it demands a code wherever `other` does.
    pub fn is_at_least(&self, other: &PlanRule) -> bool {
        let covers = |pattern: &String| {
            self.resource_types.iter().any(|own| match own.strip_suffix('*') {
                Some(stem) => pattern.starts_with(stem),
                None => own == pattern,
            })
        };
        let limit = |rule: &PlanRule| rule.more_than.map_or(u64::MAX, u64::from);
        (self.destructive || !other.destructive)
            && other.resource_types.iter().all(covers)
            && limit(self) <= limit(other)
    }
}

impl PlanFacts {
    pub const MOST_TYPES: usize = 256;
    pub const LONGEST_TYPE: usize = 128;
    pub const LONGEST_ADDRESS: usize = 512;

    /// Counts one resource that the plan changes.
    pub fn add(&mut self, address: &str, resource_type: &str, destroyed: Option<DestroyedBy>) {
        self.changes = self.changes.saturating_add(1);
        if self.destroys.is_none()
            && let Some(by) = destroyed
        {
            let end = address.floor_char_boundary(Self::LONGEST_ADDRESS);
            self.destroys = Some(Destroys { address: address[..end].to_owned(), by });
        }
        if self.types.contains(resource_type) {
            return;
        }
        if self.types.len() < Self::MOST_TYPES && resource_type.len() <= Self::LONGEST_TYPE {
            self.types.insert(resource_type.to_owned());
        } else {
            self.more_types = true;
        }
    }
}

/// A sentence for the person: what the plan does, and what the rule demands for that.
impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let demand = "the environment demands a code for";
        match self {
            Match::Destructive(Destroys { address, by }) => {
                let does = match by {
                    DestroyedBy::Destroying => "destroys",
                    DestroyedBy::Replacing => "replaces",
                };
                write!(
                    f,
                    "the plan {does} {address}: {demand} plans that destroy or replace anything"
                )
            }
            Match::Type(name) => {
                write!(f, "the plan changes resources of the type {name}: {demand} that")
            }
            Match::ManyTypes => write!(
                f,
                "the plan changes more types of resources than can be looked at: {demand} some"
            ),
            Match::Changes { changes, more_than } => {
                write!(f, "the plan changes {changes} resources: {demand} more than {more_than}")
            }
            Match::Unknown => write!(
                f,
                "what the plan would do cannot be told in full: {demand} some plans, so for this \
                 one too"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::btree_set;
    use proptest::option;
    use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
    use proptest::{prop_assert, prop_assume};

    use super::*;

    fn rule(destructive: bool, types: &[&str], more_than: Option<u32>) -> PlanRule {
        let resource_types = types.iter().map(|name| (*name).to_owned()).collect();
        PlanRule { destructive, resource_types, more_than }
    }

    fn facts(changes: &[(&str, &str, Option<DestroyedBy>)]) -> PlanFacts {
        let mut facts = PlanFacts::default();
        for (address, resource_type, destroyed) in changes {
            facts.add(address, resource_type, *destroyed);
        }
        facts
    }

    #[track_caller]
    fn check(rule: &PlanRule, facts: Option<&PlanFacts>, expect: Option<&str>) {
        let found = rule.matches(facts).map(|found| found.to_string());
        match expect {
            None => assert_eq!(found, None),
            Some(part) => assert!(found.as_ref().is_some_and(|f| f.contains(part)), "{found:?}"),
        }
    }

    #[test]
    fn each_part_of_a_rule_is_enough_and_none_matches_what_it_does_not_name() {
        let update = facts(&[("aws_s3_bucket.a", "aws_s3_bucket", None)]);
        let replace =
            facts(&[("aws_iam_role.admin", "aws_iam_role", Some(DestroyedBy::Replacing))]);
        let destroy = facts(&[("aws_vpc.x", "aws_vpc", Some(DestroyedBy::Destroying))]);
        let three = facts(&[("a.a", "a", None), ("b.b", "b", None), ("b.c", "b", None)]);
        let nothing = facts(&[]);
        let table = [
            (rule(false, &[], None), Some(&replace), None),
            (rule(false, &[], None), None, None),
            (rule(true, &[], None), Some(&update), None),
            (rule(true, &[], None), Some(&replace), Some("replaces aws_iam_role.admin: the env")),
            (rule(true, &[], None), Some(&destroy), Some("destroys aws_vpc.x")),
            (rule(true, &[], None), None, Some("cannot be told")),
            (rule(false, &["aws_s3_bucket"], None), Some(&update), Some("type aws_s3_bucket")),
            (rule(false, &["aws_iam_role"], None), Some(&update), None),
            (rule(false, &["aws_iam_*"], None), Some(&replace), Some("type aws_iam_role")),
            (rule(false, &["aws_iam_*"], None), Some(&update), None),
            (rule(false, &["*"], None), Some(&update), Some("type aws_s3_bucket")),
            (rule(false, &["*"], None), Some(&nothing), None),
            (rule(false, &["aws_iam"], None), Some(&replace), None),
            (rule(false, &["x"], None), None, Some("cannot be told")),
            (rule(false, &[], Some(2)), Some(&three), Some("changes 3 resources")),
            (rule(false, &[], Some(3)), Some(&three), None),
            (rule(false, &[], Some(0)), Some(&nothing), None),
            (rule(false, &[], Some(u32::MAX)), None, Some("cannot be told")),
        ];
        for (rule, facts, expect) in &table {
            check(rule, *facts, *expect);
        }
    }

    #[test]
    fn more_types_than_are_kept_match_any_rule_of_types() {
        let mut many = PlanFacts::default();
        for number in 0..=PlanFacts::MOST_TYPES {
            many.add("a", &format!("type_{number:03}"), None);
        }
        assert_eq!((many.types.len(), many.more_types), (PlanFacts::MOST_TYPES, true));
        check(&rule(false, &["aws_iam_role"], None), Some(&many), Some("more types"));
        check(&rule(true, &[], None), Some(&many), None);
        let long = facts(&[("a", &"x".repeat(PlanFacts::LONGEST_TYPE + 1), None)]);
        assert!(long.types.is_empty() && long.more_types);
    }

    #[test]
    fn what_is_kept_of_an_address_is_bounded() {
        let long = "ä".repeat(PlanFacts::LONGEST_ADDRESS);
        let facts = facts(&[(&long, "a", Some(DestroyedBy::Destroying))]);
        assert!(facts.destroys.is_some_and(|d| d.address.len() <= PlanFacts::LONGEST_ADDRESS));
    }

    fn some_rule() -> impl Strategy<Value = PlanRule> {
        let name = prop_oneof![
            Just("*"),
            Just("a*"),
            Just("a"),
            Just("ab"),
            Just("ab*"),
            Just("b"),
            Just("c*")
        ];
        let types = btree_set(name.prop_map(str::to_owned), 0..4);
        (any::<bool>(), types, option::of(0..6_u32)).prop_map(
            |(destructive, resource_types, more_than)| PlanRule {
                destructive,
                resource_types,
                more_than,
            },
        )
    }

    fn some_facts() -> impl Strategy<Value = Option<PlanFacts>> {
        let name = prop_oneof![Just("a"), Just("ab"), Just("abc"), Just("b"), Just("c"), Just("d")];
        let types = btree_set(name.prop_map(str::to_owned), 0..4);
        let destroys =
            option::of(Just(Destroys { address: "a.b".into(), by: DestroyedBy::Destroying }));
        let facts = (0..8_u32, destroys, types, any::<bool>()).prop_map(
            |(changes, destroys, types, more_types)| PlanFacts {
                changes,
                destroys,
                types,
                more_types,
            },
        );
        option::of(facts)
    }

    proptest! {
        #![proptest_config(proptest::test_runner::Config {
            cases: 4_000,
            max_global_rejects: 200_000,
            ..Default::default()
        })]

        #[test]
        fn a_stricter_rule_never_demands_less(
            stricter in some_rule(), rule in some_rule(), facts in some_facts(),
        ) {
            prop_assume!(stricter.is_at_least(&rule));
            if rule.matches(facts.as_ref()).is_some() {
                prop_assert!(stricter.matches(facts.as_ref()).is_some(), "{stricter:?} {rule:?}");
            }
        }

        #[test]
        fn strictness_is_an_order(a in some_rule(), b in some_rule(), c in some_rule()) {
            prop_assert!(a.is_at_least(&a) && a.is_at_least(&PlanRule::default()));
            if a.is_at_least(&b) && b.is_at_least(&c) {
                prop_assert!(a.is_at_least(&c));
            }
        }
    }
}
