// Command health tells what GitOps tools make of objects: kstatus by its own library (Flux, Helm 4, kpt use it), and
// Argo CD's health by the Lua of an argocd-cm ConfigMap, run as Argo CD runs it.
//
//	health ARGOCD-CM.json < OBJECTS
//
// Objects are JSON, one a line; so are the answers. It talks to no cluster.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

// Said is a status and the words with it.
type Said struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

// Answer is what both say of one object. Argo is nil when the ConfigMap has no Lua for the kind: Argo CD then counts
// the object as healthy as soon as it is there.
type Answer struct {
	Kstatus Said  `json:"kstatus"`
	Argo    *Said `json:"argo"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "health:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("usage: health ARGOCD-CM.json < OBJECTS")
	}
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		return err
	}
	var config struct {
		Data map[string]string `json:"data"`
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return fmt.Errorf("%s: %w", os.Args[1], err)
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	answers := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(lines.Bytes()); err != nil {
			return err
		}
		result, err := status.Compute(object)
		if err != nil {
			return fmt.Errorf("%s: %w", object.GetName(), err)
		}
		answer := Answer{
			Kstatus: Said{result.Status.String(), result.Message},
			Argo:    argo(object, config.Data),
		}
		if err := answers.Encode(answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

// argo goes the way of Argo CD: what is being deleted is not asked for its health, unless a hook holds it.
func argo(object *unstructured.Unstructured, config map[string]string) *Said {
	held := slices.Contains(object.GetFinalizers(), "argocd.argoproj.io/hook-finalizer")
	if object.GetDeletionTimestamp() != nil && !held {
		return &Said{"Progressing", "Pending deletion"}
	}
	kind := object.GroupVersionKind()
	script, found := config[fmt.Sprintf("resource.customizations.health.%s_%s", kind.Group, kind.Kind)]
	if !found {
		return nil
	}
	said, err := health(script, object.Object)
	if err != nil {
		return &Said{"Unknown", err.Error()}
	}
	return said
}

// The statuses that Argo CD takes from a script.
var statuses = []string{"Healthy", "Suspended", "Progressing", "Missing", "Degraded", "Unknown"}

// health runs a script with what Argo CD gives it: `obj`, the libraries base, package and table, `os.time` and
// `os.date`, and one second.
func health(script string, object map[string]any) (*Said, error) {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for _, library := range []struct {
		name string
		open lua.LGFunction
	}{
		{lua.LoadLibName, lua.OpenPackage},
		{lua.BaseLibName, lua.OpenBase},
		{lua.TabLibName, lua.OpenTable},
		{lua.OsLibName, lua.OpenOs},
	} {
		state.Push(state.NewFunction(library.open))
		state.Push(lua.LString(library.name))
		if err := state.PCall(1, 0, nil); err != nil {
			return nil, err
		}
	}
	system := state.GetGlobal(lua.OsLibName).(*lua.LTable)
	var unsafe []string
	system.ForEach(func(name, _ lua.LValue) {
		if !slices.Contains([]string{"time", "date"}, name.String()) {
			unsafe = append(unsafe, name.String())
		}
	})
	for _, name := range unsafe {
		system.RawSetString(name, lua.LNil)
	}
	state.SetGlobal("obj", value(state, object))

	bounded, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	state.SetContext(bounded)
	if err := state.DoString(script); err != nil {
		return nil, err
	}
	table, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return nil, fmt.Errorf("the script returned a %s, not a table", state.Get(-1).Type())
	}
	said := &Said{lua.LVAsString(table.RawGetString("status")), lua.LVAsString(table.RawGetString("message"))}
	if !slices.Contains(statuses, said.Status) {
		return nil, fmt.Errorf("the script returned the health status %q, which Argo CD does not know", said.Status)
	}
	return said, nil
}

// value is a JSON value in Lua.
func value(state *lua.LState, json any) lua.LValue {
	switch json := json.(type) {
	case bool:
		return lua.LBool(json)
	case int64:
		return lua.LNumber(json)
	case float64:
		return lua.LNumber(json)
	case string:
		return lua.LString(json)
	case []any:
		list := state.NewTable()
		for _, item := range json {
			list.Append(value(state, item))
		}
		return list
	case map[string]any:
		table := state.NewTable()
		for key, item := range json {
			table.RawSetString(key, value(state, item))
		}
		return table
	default:
		return lua.LNil
	}
}
